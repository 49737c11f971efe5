#include "cuda_host.h"

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace cuda_host {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kMostThreads = 1024, kMostGridYZ = 65535;
constexpr size_t kMostSharedBytes = 48 << 10;  // without an attribute on the kernel that allows more

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool ended = false;
  std::string waits_at;      // the barrier's name
  std::exception_ptr error;  // what the kernel threw; it may not leave the fiber
};

// Everything that a launch in progress shares with its fibers; a single host thread runs them all.
struct State {
  Schedule schedule = Schedule::Ascending;
  std::mt19937 random{0};
  std::string skipped;
  std::set<std::string> seen;
  std::string seen_text;
  std::vector<Thread> threads;  // grows, so that stacks are allocated once
  Thread* running = nullptr;
  ucontext_t scheduler;
  const std::function<void()>* kernel = nullptr;
  std::unique_ptr<unsigned char[]> shared;
  size_t shared_bytes = 0;
} state;

std::string name_of(const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
}

void run_thread() {
  try {
    (*state.kernel)();
  } catch (...) {
    state.running->error = std::current_exception();
  }
  state.running->ended = true;
  swapcontext(&state.running->context, &state.scheduler);
}

std::vector<unsigned> turns(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (state.schedule == Schedule::Descending) std::reverse(order.begin(), order.end());
  if (state.schedule == Schedule::Random) std::shuffle(order.begin(), order.end(), state.random);
  return order;
}

// All threads stand at the same barrier, or all have ended.
bool check_together(unsigned threads) {
  const Thread& first = state.threads[0];
  for (unsigned i = 1; i < threads; ++i) {
    const Thread& other = state.threads[i];
    if (other.ended != first.ended || other.waits_at != first.waits_at) {
      const auto where = [](const Thread& t) { return t.ended ? "at the end" : "at the barrier " + t.waits_at; };
      throw std::runtime_error("threads 0 and " + std::to_string(i) + " of a block have diverged: one waits " + where(first) +
                               ", the other " + where(other));
    }
  }
  return !first.ended;
}

void run_block(unsigned threads) {
  std::memset(state.shared.get(), 0xFF, state.shared_bytes);
  for (unsigned i = 0; i < threads; ++i) {
    Thread& thread = state.threads[i];
    thread.ended = false;
    thread.waits_at.clear();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
  }
  do {
    for (const unsigned i : turns(threads)) {
      state.running = &state.threads[i];
      threadIdx = dim3(i, 0, 0);
      swapcontext(&state.scheduler, &state.running->context);
      if (state.running->error) std::rethrow_exception(std::exchange(state.running->error, nullptr));
    }
  } while (check_together(threads));
}

}  // namespace

void set_schedule(Schedule schedule) {
  state.schedule = schedule;
  state.random.seed(0);
}

void barrier(const char* file, int line) {
  const std::string name = name_of(file, line);
  state.seen.insert(name);
  if (name == state.skipped) return;
  state.running->waits_at = name;
  swapcontext(&state.running->context, &state.scheduler);
}

const char* barriers_seen() {
  state.seen_text.clear();
  for (const std::string& name : state.seen) state.seen_text += (state.seen_text.empty() ? "" : " ") + name;
  return state.seen_text.c_str();
}

void skip_barrier(const char* name) { state.skipped = name; }

void* shared_memory(size_t size) {
  if (size > state.shared_bytes)
    throw std::runtime_error("the kernel uses " + std::to_string(size) + " bytes of shared memory, launched with " +
                             std::to_string(state.shared_bytes));
  return state.shared.get();
}

void run_grid(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (grid.x == 0 || grid.x > 0x7FFFFFFFu || grid.y == 0 || grid.y > kMostGridYZ || grid.z == 0 || grid.z > kMostGridYZ ||
      threads == 0 || threads > kMostThreads || shared_bytes > kMostSharedBytes)
    throw std::runtime_error("CUDA would refuse this launch: grid " + std::to_string(grid.x) + " x " + std::to_string(grid.y) +
                             " x " + std::to_string(grid.z) + ", " + std::to_string(threads) + " threads, " +
                             std::to_string(shared_bytes) + " bytes of shared memory");
  if (state.threads.size() < threads) state.threads.resize(threads);
  state.kernel = &kernel;
  state.shared.reset(new unsigned char[shared_bytes]);
  state.shared_bytes = shared_bytes;
  gridDim = grid;
  blockDim = dim3(threads);
  for (const unsigned block : turns(grid.x * grid.y * grid.z)) {
    blockIdx = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
    run_block(threads);
  }
}

}  // namespace cuda_host
