#include "core/status.h"

#include <cstdarg>
#include <cstdio>

namespace fastops {

void set_message(char* buffer, const char* format, ...) {
  if (buffer == nullptr) return;
  va_list args;
  va_start(args, format);
  std::vsnprintf(buffer, FASTOPS_MESSAGE_SIZE, format, args);
  va_end(args);
}

}  // namespace fastops
