// Two ways to run the threads of a block (included by on_host.h): as threads of the operating system, whose
// races and accesses the sanitizers see, or, a hundred times faster, in turn as fibers of one, with
// FDCR_FIBERS.

#ifndef FDCR_FIBERS

class Barrier {
 public:
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

template <class Body>
void run_threads(const Body& body) {
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < kThreads; ++t)
    threads.emplace_back([&body, t] {
      Thread thread;
      thread.thread.x = t;
      self = &thread;
      body();
    });
  for (std::thread& thread : threads) thread.join();
}

#else

struct Fiber {
  Thread thread;
  ucontext_t begin;
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  bool begun = false, done = false;
};
constexpr size_t kStack = 1 << 17;
inline std::vector<Fiber> fibers;
inline std::function<void()> fiber_body;
inline ucontext_t outside;

// Goes on with the next fiber that is not done, or outside.
inline void go_on() {
  const unsigned now = self->thread.x;
  for (unsigned i = 1; i <= kThreads; ++i) {
    Fiber& next = fibers[(now + i) % kThreads];
    if (next.done) continue;
    self = &next.thread;
    if (next.begun) _longjmp(next.at, 1);
    next.begun = true;
    setcontext(&next.begin);
  }
  setcontext(&outside);
}

class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}

  void wait() {
    const unsigned meeting = meeting_;
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++meeting_;
      return;
    }
    while (meeting_ == meeting)
      if (_setjmp(fibers[self->thread.x].at) == 0) go_on();
  }

 private:
  const unsigned threads_;
  unsigned arrived_ = 0;
  volatile unsigned meeting_ = 0;
};

inline void run_fiber() {
  fiber_body();
  fibers[self->thread.x].done = true;
  go_on();
}

template <class Body>
void run_threads(const Body& body) {
  fiber_body = body;
  fibers = std::vector<Fiber>(kThreads);
  for (unsigned t = 0; t < kThreads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.thread.thread.x = t;
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.begin);
    fiber.begin.uc_stack.ss_sp = fiber.stack.get();
    fiber.begin.uc_stack.ss_size = kStack;
    makecontext(&fiber.begin, run_fiber, 0);
  }
  self = &fibers[0].thread;
  fibers[0].begun = true;
  swapcontext(&outside, &fibers[0].begin);
}

#endif
