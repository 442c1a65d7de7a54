#include "cuda/emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastops::emulator {
namespace {
thread_local Fiber* t_current = nullptr;
}

#if defined(__x86_64__)
// Saves what a called function must keep, exchanges stack pointers, and returns on the other stack. (ucontext would do,
// but asks the kernel for the signal mask at every switch: fifty times slower.)
extern "C" void fastops_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl fastops_emulator_switch
.hidden fastops_emulator_switch
.type fastops_emulator_switch, @function
fastops_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastops_emulator_switch, .-fastops_emulator_switch
)");
#else
namespace {
void fastops_emulator_switch(void** save, void* load) {
  auto* from = new ucontext_t;
  *save = from;
  swapcontext(from, static_cast<ucontext_t*>(load));
  delete from;
}
}  // namespace
#endif

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_, kStackBytes);
}

void Fiber::start(void (*body)(void*), void* arg) {
  if (stack_ == nullptr) {
    stack_ = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack_ == MAP_FAILED) std::abort();
    mprotect(stack_, 4096, PROT_NONE);  // a kernel that recurses too deep stops here
  }
  body_ = body;
  arg_ = arg;
  done_ = false;
  char* top = static_cast<char*>(stack_) + kStackBytes;
#if defined(__x86_64__)
  void** sp = reinterpret_cast<void**>(top - 16);  // so that enter() begins as if it had been called
  *sp = reinterpret_cast<void*>(&Fiber::enter);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  here_ = sp;
#else
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack_;
  context->uc_stack.ss_size = static_cast<size_t>(top - static_cast<char*>(stack_));
  context->uc_link = nullptr;
  makecontext(context, &Fiber::enter, 0);
  here_ = context;
#endif
}

void Fiber::enter() {
  Fiber* me = t_current;
  me->body_(me->arg_);
  me->done_ = true;
  suspend();
  std::abort();  // nobody resumes a fiber that is done
}

void Fiber::resume() {
  Fiber* before = t_current;
  t_current = this;
  fastops_emulator_switch(&there_, here_);
  t_current = before;
}

void Fiber::suspend() {
  Fiber* me = t_current;
  fastops_emulator_switch(&me->here_, me->there_);
}

}  // namespace fastops::emulator
