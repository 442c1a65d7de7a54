// A C++17 program that finds the installed library by find_package(fastops CONFIG).
#include <fastops/fastops.h>

#include <cstdio>
#include <string>
#include <type_traits>

static_assert(std::is_trivial_v<fastops_attention_desc> && std::is_standard_layout_v<fastops_attention_desc>);
static_assert(std::is_trivial_v<fastops_env> && std::is_standard_layout_v<fastops_env>);

int main() {
  fastops_scale_add_desc d{};
  char message[FASTOPS_MESSAGE_SIZE] = "";
  const fastops_status status = fastops_scale_add_check(&d, message);  // struct_size is 0
  if (status != FASTOPS_ERR_VALUE || std::string(message).find("struct_size") == std::string::npos) return 1;
  std::printf("ok %s\n", fastops_version());
}
