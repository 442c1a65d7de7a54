// Error messages: a sentence into the caller's buffer.
#pragma once
#include "fastops/fastops.h"

namespace fastops {

// printf into `buffer` (NULL or FASTOPS_MESSAGE_SIZE bytes).
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
void set_message(char* buffer, const char* format, ...);

}  // namespace fastops
