#include "cuda_host.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sanitizer/asan_interface.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/platform.cuh"

namespace cuda_host {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kMostThreads = 1024, kMostGridYZ = 65535;
constexpr unsigned kWarp = 32;
using slowfast_fast::cuda::kMostSharedBytes;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;

  void happen() const {
    if (from) std::memcpy(to, from, bytes);
    else std::memset(to, 0, bytes);
  }
};

// Where a stack that is not running goes on. Not by swapcontext, whose system calls would take most of the time.
using Place = jmp_buf;

struct Thread {
  ucontext_t begin;
  Place place;
  bool begun = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool ended = false;
  std::string waits_at;    // the barrier's or the warp's instruction's name
  bool meets = false;      // waits for the lanes of its warp, not for the block
  std::vector<Copy> open;  // copies of no group yet
  std::deque<std::vector<Copy>> groups;
  std::exception_ptr error;  // what the kernel threw; it may not leave the fiber
};

struct Warp {
  const char* instruction;
  Site site;
  unsigned arrived = 0, meetings = 0;
  Luggage luggage[2][kWarp];  // of this meeting and of the last one, which some lanes may not have read yet
};

// Everything that a launch in progress shares with its fibers; a single host thread runs them all.
struct State {
  Schedule schedule = Schedule::Ascending;
  std::mt19937 random{0};
  std::string skipped;
  std::set<std::string> seen;
  std::string seen_text;
  std::set<std::string> launched;
  std::string launched_text;
  std::vector<Thread> threads;  // grows, so that stacks are allocated once
  std::vector<Warp> warps;
  Thread* running = nullptr;
  Place scheduler;
  const std::function<void()>* kernel = nullptr;
  std::unique_ptr<unsigned char[]> shared;
  size_t shared_bytes = 0;
} state;

// Back to the scheduler, until it resumes the running thread.
__attribute__((noinline)) void stand_by() {
  if (!_setjmp(state.running->place)) _longjmp(state.scheduler, 1);
}

__attribute__((noinline)) void resume(Thread& thread) {
  state.running = &thread;
  if (_setjmp(state.scheduler)) return;
  if (std::exchange(thread.begun, true)) _longjmp(thread.place, 1);
  setcontext(&thread.begin);
}

// Notes the place, and says whether the test wants it skipped.
bool skips(const Site& site) {
  const std::string name = site.name();
  state.seen.insert(name);
  return name == state.skipped;
}

// The names with spaces between them, in `text`, which outlives the call.
const char* joined(const std::set<std::string>& names, std::string& text) {
  text.clear();
  for (const std::string& name : names) text += (text.empty() ? "" : " ") + name;
  return text.c_str();
}

void run_thread() {
  try {
    (*state.kernel)();
  } catch (...) {
    state.running->error = std::current_exception();
  }
  state.running->ended = true;
  stand_by();
}

std::vector<unsigned> turns(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (state.schedule == Schedule::Descending) std::reverse(order.begin(), order.end());
  if (state.schedule == Schedule::Random) std::shuffle(order.begin(), order.end(), state.random);
  return order;
}

// For threads that can not go on: all stand at the same barrier of the block, or all have ended.
bool check_together(unsigned threads) {
  const Thread& first = state.threads[0];
  for (unsigned i = 0; i < threads; ++i) {
    const Thread& other = state.threads[i];
    if (other.meets || other.ended != first.ended || other.waits_at != first.waits_at) {
      const auto where = [](const Thread& t) { return t.ended ? "at the end" : "at " + t.waits_at; };
      const std::string which = i ? "threads 0 and " + std::to_string(i) + " of a block" : "the lanes of a warp";
      throw std::runtime_error(which + " have diverged: one waits " + where(first) + ", another " + where(other));
    }
    const auto empty = [](const std::vector<Copy>& group) { return group.empty(); };
    if (other.ended && !(other.open.empty() && std::all_of(other.groups.begin(), other.groups.end(), empty)))
      throw std::runtime_error("thread " + std::to_string(i) + " ended with copies that it had not waited for");
  }
  return !first.ended;
}

void run_block(unsigned threads) {
  std::memset(state.shared.get(), 0xFF, state.shared_bytes);
  for (Warp& warp : state.warps) warp.arrived = 0;
  for (unsigned i = 0; i < threads; ++i) {
    Thread& thread = state.threads[i];
    thread.begun = thread.ended = thread.meets = false;
    thread.waits_at.clear();
    thread.open.clear();
    thread.groups.clear();
    ASAN_UNPOISON_MEMORY_REGION(thread.stack.get(), kStackBytes);  // the last block's threads never returned from it
    getcontext(&thread.begin);
    thread.begin.uc_stack.ss_sp = thread.stack.get();
    thread.begin.uc_stack.ss_size = kStackBytes;
    thread.begin.uc_link = nullptr;
    makecontext(&thread.begin, run_thread, 0);
  }
  do {
    for (unsigned i = 0; i < threads; ++i) state.threads[i].waits_at.clear();
    for (bool any = true; any;) {
      any = false;
      // Half of the warps, drawn anew every time: so some get ahead of others by more than one instruction.
      const auto resting = uint32_t(state.schedule == Schedule::Random ? state.random() : 0);
      static_assert(kMostThreads / kWarp <= 32);
      for (const unsigned i : turns(threads)) {
        Thread& thread = state.threads[i];
        if (thread.ended || thread.meets || !thread.waits_at.empty()) continue;
        any = true;
        if (resting >> i / kWarp & 1) continue;
        threadIdx = dim3(i, 0, 0);
        resume(thread);
        if (thread.error) std::rethrow_exception(std::exchange(thread.error, nullptr));
      }
    }
  } while (check_together(threads));
}

}  // namespace

void set_schedule(Schedule schedule) {
  state.schedule = schedule;
  state.random.seed(0);
}

std::string Site::name() const {
  const char* slash = std::strrchr(file, '/');
  return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
}

void barrier(const Site& site) {
  if (skips(site)) return;
  state.running->waits_at = site.name();
  stand_by();
}

void warp_barrier(const Site& site) {
  if (!skips(site)) meet("__syncwarp", site, nullptr, 0);
}

const Luggage* meet(const char* instruction, const Site& site, const void* mine, size_t bytes, Combine combine) {
  Warp& warp = state.warps[threadIdx.x / kWarp];
  if (warp.arrived == 0) {
    warp.instruction = instruction;
    warp.site = site;
  } else if (!(warp.site == site)) {
    throw std::runtime_error("the lanes of a warp have diverged: one is at " + std::string(warp.instruction) + " in " +
                             warp.site.name() + ", another at " + instruction + " in " + site.name());
  }
  Luggage* luggage = warp.luggage[warp.meetings % 2];
  if (bytes) std::memcpy(&luggage[threadIdx.x % kWarp], mine, bytes);
  if (++warp.arrived < kWarp) {
    state.running->meets = true;
    state.running->waits_at = instruction;
    stand_by();
    return luggage;
  }
  if (combine) combine(*reinterpret_cast<Luggage(*)[kWarp]>(luggage));
  warp.arrived = 0;
  ++warp.meetings;
  for (unsigned i = threadIdx.x / kWarp * kWarp, end = i + kWarp; i < end; ++i) {
    state.threads[i].meets = false;
    state.threads[i].waits_at.clear();
  }
  return luggage;
}

void check_aligned(const char* instruction, const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    throw std::runtime_error(std::string(instruction) + " at an address that is no multiple of " +
                             std::to_string(bytes));
}

void check_shared(const char* instruction, const void* address, size_t bytes) {
  check_aligned(instruction, address, bytes);
  const auto* begin = static_cast<const unsigned char*>(address);
  if (begin < state.shared.get() || begin + bytes > state.shared.get() + state.shared_bytes)
    throw std::runtime_error(std::string(instruction) + " at an address outside of shared memory");
}

void copy_later(void* to, const void* from, size_t bytes) {
  const Copy copy{to, from, bytes};
  const bool early =
      state.schedule == Schedule::Ascending || (state.schedule == Schedule::Random && state.random() % 2);
  if (early) copy.happen();
  else state.running->open.push_back(copy);
}

void close_group() { state.running->groups.push_back(std::exchange(state.running->open, {})); }

void wait_for_groups(size_t but_newest, const Site& site) {
  if (skips(site)) return;
  auto& groups = state.running->groups;
  for (; groups.size() > but_newest; groups.pop_front())
    for (const Copy& copy : groups.front()) copy.happen();
}

const char* barriers_seen() { return joined(state.seen, state.seen_text); }

// A kernel is an instance of a template and so has a symbol, "void slowfast_fast::cuda::name<...>(...)" when demangled.
void note_launch(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) throw std::runtime_error("a kernel without a symbol");
  const std::unique_ptr<char, void (*)(void*)> demangled{abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr),
                                                         std::free};
  std::string name = demangled ? demangled.get() : info.dli_sname;
  name.erase(std::min(name.find('<'), name.find('(')));
  state.launched.insert(name.substr(name.rfind(':') + 1));
}

const char* kernels_launched() { return joined(state.launched, state.launched_text); }

void forget_launches() {
  state.launched.clear();
  state.seen.clear();
}

void skip_barrier(const char* name) { state.skipped = name; }

void* shared_memory(size_t size) {
  if (size > state.shared_bytes)
    throw std::runtime_error("the kernel uses " + std::to_string(size) + " bytes of shared memory, launched with " +
                             std::to_string(state.shared_bytes));
  return state.shared.get();
}

void run_grid(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (grid.x == 0 || grid.x > 0x7FFFFFFFu || grid.y == 0 || grid.y > kMostGridYZ || grid.z == 0 ||
      grid.z > kMostGridYZ || threads == 0 || threads > kMostThreads || shared_bytes > kMostSharedBytes)
    throw std::runtime_error("CUDA would refuse this launch: grid " + std::to_string(grid.x) + " x " +
                             std::to_string(grid.y) + " x " + std::to_string(grid.z) + ", " + std::to_string(threads) +
                             " threads, " + std::to_string(shared_bytes) + " bytes of shared memory");
  if (state.threads.size() < threads) state.threads.resize(threads);
  state.warps.resize((threads + kWarp - 1) / kWarp);
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
