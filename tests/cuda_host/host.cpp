// The threads of a block as fibres: each runs until it waits for others, then the next one does.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace camkernels {
namespace cuda {
// Behind what a launch asked for nothing may be touched; `watch` sees to it.
alignas(16) float camkernels_shared[cuda_host::kSharedBytes / sizeof(float)];
}  // namespace cuda
}  // namespace camkernels

namespace cuda_host {

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kNobody = -1, kSeveral = -2;
constexpr int kNever = -1;  // no epoch

enum State { kReady, kAtBarrier, kInWarp, kEnded };

struct Fibre {
  State state;
  bool begun;
  const char* file;
  int line;
  unsigned mask;
  uint32_t value;
  uint32_t received[kWarp];
  int fenced;  // epoch of its last fence
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
};

// Who touched four bytes of shared memory since the last barrier.
struct Cell {
  int epoch, writer, reader;
};

Fibre fibres[kMostThreads];
Cell cells[kSharedBytes / 4];
jmp_buf scheduler;
const std::function<void()>* body;
int threads, current, epoch, arrived;
size_t asked_bytes;
std::string failure;
unsigned order_seed;
std::mutex one_launch;

std::string place(const Fibre& fibre) {
  return std::string(fibre.file) + ":" + std::to_string(fibre.line);
}

std::string who(int thread) {
  return "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(thread);
}

void to_scheduler() {
  if (_setjmp(fibres[current].resume) == 0) _longjmp(scheduler, 1);
}

void enter() {
  (*body)();
  fibres[current].state = kEnded;
  _longjmp(scheduler, 1);
}

void resume(int thread) {
  current = thread;
  threadIdx = dim3(thread);
  Fibre& fibre = fibres[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fibre.begun) _longjmp(fibre.resume, 1);
  fibre.begun = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fibre.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

std::vector<unsigned> ordered(unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = order_seed == 1 ? count - 1 - i : i;
  if (order_seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937(order_seed));
  return order;
}

// Lets a warp's lanes go on that wait for each other; true where some do.
bool release_warp(int first) {
  bool released = false;
  for (int i = first; i < first + kWarp && i < threads; ++i) {
    if (fibres[i].state != kInWarp) continue;
    const unsigned mask = fibres[i].mask;
    bool complete = true;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1u)) continue;
      if (first + lane >= threads) {
        complete = false;
        continue;
      }
      const Fibre& other = fibres[first + lane];
      complete = complete && other.state == kInWarp && other.mask == mask &&
                 other.line == fibres[i].line && other.file == fibres[i].file;
    }
    if (!complete) continue;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1u)) continue;
      Fibre& fibre = fibres[first + lane];
      for (int j = 0; j < kWarp; ++j) {
        fibre.received[j] = mask >> j & 1u ? fibres[first + j].value : 0;
      }
      fibre.state = kReady;
    }
    released = true;
  }
  return released;
}

// All wait or have ended: either all stand at one barrier, or never any goes on.
bool release_barrier() {
  for (int i = 0; i < threads; ++i) {
    if (fibres[i].state != kAtBarrier || fibres[i].line != fibres[0].line ||
        fibres[i].file != fibres[0].file) {
      return false;
    }
  }
  for (int i = 0; i < threads; ++i) fibres[i].state = kReady;
  ++epoch;
  return true;
}

std::string stalled() {
  const char* kinds[] = {"is ready", "waits at the barrier ", "waits for its warp at ",
                         "has ended"};
  std::string text = "threads wait for others that do not come: ";
  std::string last;
  for (int i = 0; i < threads; ++i) {
    std::string now = kinds[fibres[i].state];
    if (fibres[i].state != kEnded) now += place(fibres[i]);
    if (now == last) continue;
    if (!last.empty()) text += "; ";
    text += who(i) + " " + now;
    last = now;
  }
  return text;
}

void run_block() {
  std::memset(camkernels::cuda::camkernels_shared, 0xff, kSharedBytes);  // NaN
  ++epoch;
  arrived = kNever;
  for (int i = 0; i < threads; ++i) {
    fibres[i].state = kReady;
    fibres[i].begun = false;
    fibres[i].fenced = kNever;
    if (!fibres[i].stack) fibres[i].stack.reset(new char[kStackBytes]);
  }
  const std::vector<unsigned> lanes = ordered(kWarp), warps = ordered(threads / kWarp);
  while (failure.empty()) {
    // Each warp goes as far as it can alone, so that warps are never in step by chance.
    for (const unsigned warp : warps) {
      const int first = (int)warp * kWarp;
      do {
        for (const unsigned lane : lanes) {
          if (fibres[first + lane].state == kReady) resume(first + (int)lane);
          if (!failure.empty()) return;
        }
      } while (release_warp(first));
    }
    bool ended = true;
    for (int i = 0; i < threads; ++i) ended = ended && fibres[i].state == kEnded;
    if (ended) return;
    if (!release_barrier()) failure = stalled();
  }
}

}  // namespace

void set_order(unsigned seed) { order_seed = seed; }

int lane() { return current % kWarp; }

void fail(const char* message) {
  failure = who(current) + ": " + message;
  _longjmp(scheduler, 1);
}

void barrier(const char* file, int line) {
  Fibre& fibre = fibres[current];
  fibre.state = kAtBarrier;
  fibre.file = file;
  fibre.line = line;
  to_scheduler();
}

const uint32_t* exchange(const char* file, int line, unsigned mask, uint32_t value) {
  Fibre& fibre = fibres[current];
  if (!(mask >> lane() & 1u)) fail("a lane takes part in a warp operation whose mask lacks it");
  fibre.state = kInWarp;
  fibre.file = file;
  fibre.line = line;
  fibre.mask = mask;
  fibre.value = value;
  to_scheduler();
  return fibre.received;
}

void watch(const void* address, size_t bytes, bool writes) {
  const size_t begin =
      (size_t)((const char*)address - (const char*)camkernels::cuda::camkernels_shared);
  if (begin > asked_bytes || bytes > asked_bytes - begin) {
    fail("shared memory is accessed outside of what the launch asked for");
  }
  Cell& cell = cells[begin / 4];
  if (cell.epoch != epoch) cell = {epoch, kNobody, kNobody};
  const auto another = [](int thread) { return thread != kNobody && thread != current; };
  if (another(cell.writer) || (writes && another(cell.reader))) {
    fail("a race on shared memory: no barrier since another thread's access");
  }
  if (writes) {
    cell.writer = current;
  } else {
    cell.reader = cell.reader == kNobody || cell.reader == current ? current : kSeveral;
  }
}

void fence() { fibres[current].fenced = epoch; }

void arrive() {
  for (int i = 0; i < threads; ++i) {
    if (fibres[i].fenced != epoch - 1) {
      fail("the block arrives before all its threads have fenced and met at a barrier");
    }
  }
  arrived = epoch;
}

void read_from_others() {
  if (arrived != kNever && fibres[current].fenced <= arrived) {
    fail("what other blocks wrote is read without a fence since the arrival");
  }
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (block.x > kMostThreads || block.x % kWarp != 0) {
    throw std::runtime_error("a block has up to 1024 threads, in whole warps");
  }
  gridDim = grid;
  blockDim = block;
  threads = (int)block.x;
  asked_bytes = shared_bytes;
  body = &thread;
  failure.clear();
  for (const unsigned number : ordered(grid.x)) {
    blockIdx = dim3(number);
    run_block();
    if (!failure.empty()) throw std::runtime_error(failure);
  }
}

}  // namespace cuda_host
