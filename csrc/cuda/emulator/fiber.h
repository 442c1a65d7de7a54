// Threads of control that switch only when they say so: one per CUDA thread of a block.
#pragma once
#include <cstddef>

namespace fastops::emulator {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 128 << 10;
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Will run body(arg) from the first resume() on. May be called again when the last body has ended, or was given up.
  void start(void (*body)(void*), void* arg);
  void resume();  // returns at the next suspend(), or at the end of the body
  bool done() const { return done_; }
  static void suspend();  // from within a body: back to whoever resumed it

 private:
  static void enter();
  void* stack_ = nullptr;
  void* here_ = nullptr;   // the fiber's stack pointer while it is suspended
  void* there_ = nullptr;  // the resumer's, while the fiber runs
  void (*body_)(void*) = nullptr;
  void* arg_ = nullptr;
  bool done_ = true;
};

}  // namespace fastops::emulator
