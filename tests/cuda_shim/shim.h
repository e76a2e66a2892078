// Runs CUDA device code on a CPU: enough of the language for csrc/cuda, strict where a GPU is lenient.
//
// One ucontext fiber per CUDA thread, blocks one after another. A fiber runs until it waits at a barrier or a warp operation
// or ends; the scheduler resumes fibers in a configured order (ascending, descending, shuffled), so a missing barrier shows as
// a wrong result in one of them. Errors of a launch: a thread that ends while others wait, threads that wait at different
// barriers, a block that cannot go on. Shared memory is allocated with its exact size and holds NaN when a block starts.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };

// Storage-only 16-bit types with the toolkit's names and rounding.
struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };

inline float __half2float(__half v) {
    _Float16 h;
    std::memcpy(&h, &v, 2);
    return static_cast<float>(h);
}
inline __half __float2half_rn(float v) {
    const _Float16 h = static_cast<_Float16>(v);
    __half out;
    std::memcpy(&out, &h, 2);
    return out;
}
inline float __bfloat162float(__nv_bfloat16 v) {
    const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (v != v) return {0x7FFF};
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

namespace shim {

enum class State { ready, barrier, warp, done };

struct Fragments { uint32_t a[2][4], b[4][2]; double value; };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    State state;
    const char* site;       // where it waits
    unsigned warp_steps;    // warp operations so far: their deposits alternate between two buffers
    Fragments deposit[2];
};

struct Machine {
    std::vector<Fiber> fibers;
    std::vector<int> order;
    ucontext_t scheduler;
    int current = 0;
    int schedule = 0;       // 0 ascending, 1 descending, 2 shuffled before each round
    std::mt19937 random;
    unsigned char* shared = nullptr;
    std::function<void()> kernel;
    std::string error;
    const void* host_stack = nullptr;
    size_t host_stack_size = 0;
};
inline Machine machine;

constexpr size_t kStack = 128 * 1024;

inline void leave(State state, const char* site) {
    Fiber& fiber = machine.fibers[machine.current];
    fiber.state = state;
    fiber.site = site;
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, machine.host_stack, machine.host_stack_size);
#endif
    swapcontext(&fiber.context, &machine.scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void entry() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &machine.host_stack, &machine.host_stack_size);
#endif
    machine.kernel();
    leave(State::done, "end");
}

inline void resume(int t) {
    machine.current = t;
    threadIdx = dim3(t, 0, 0);
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, machine.fibers[t].stack.data(), kStack);
#endif
    swapcontext(&machine.scheduler, &machine.fibers[t].context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// Lets threads first .. last go on if all of them wait in `state` at one place. False and an error if they never can.
inline bool release(int first, int last, State state) {
    const char* site = nullptr;
    int waiting = 0, done = 0;
    for (int t = first; t < last; ++t) {
        const Fiber& fiber = machine.fibers[t];
        done += fiber.state == State::done;
        if (fiber.state != state) continue;
        ++waiting;
        if (site != nullptr && std::strcmp(site, fiber.site) != 0)
            return machine.error = std::string("threads wait at different places: ") + site + " and " + fiber.site, false;
        site = fiber.site;
    }
    if (waiting > 0 && done > 0) return machine.error = std::string("a thread has ended while others wait at ") + site, false;
    if (waiting == last - first)
        for (int t = first; t < last; ++t) machine.fibers[t].state = State::ready;
    return true;
}

inline bool run_block(int threads) {
    for (int t = 0; t < threads; ++t) {
        Fiber& fiber = machine.fibers[t];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, entry, 0);
        fiber.state = State::ready;
        fiber.warp_steps = 0;
    }
    for (;;) {
        if (machine.schedule == 2) std::shuffle(machine.order.begin(), machine.order.end(), machine.random);
        bool moved = false;
        for (const int t : machine.order)
            if (machine.fibers[t].state == State::ready) {
                resume(t);
                moved = true;
            }
        int done = 0;
        for (const Fiber& fiber : machine.fibers) done += fiber.state == State::done;
        if (done == threads) return true;
        if (!moved) return machine.error = "some threads wait at a barrier, others in a warp operation", false;
        for (int t = 0; t < threads; t += 32)
            if (!release(t, t + 32, State::warp)) return false;
        if (!release(0, threads, State::barrier)) return false;
    }
}

template <class F> cudaError_t run(dim3 grid, int threads, int64_t shared_bytes, F kernel) {
    if (grid.y > 65535 || grid.z > 65535 || shared_bytes > 48 * 1024) {
        machine.error = "grid or shared memory beyond what a launch allows";
        return cudaErrorInvalidConfiguration;
    }
    machine.kernel = kernel;
    machine.fibers.resize(threads);
    machine.order.resize(threads);
    for (int t = 0; t < threads; ++t) {
        machine.fibers[t].stack.resize(kStack);
        machine.order[t] = machine.schedule == 1 ? threads - 1 - t : t;
    }
    gridDim = grid;
    bool good = true;
    for (unsigned z = 0; good && z < grid.z; ++z)
        for (unsigned y = 0; good && y < grid.y; ++y)
            for (unsigned x = 0; good && x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                machine.shared = static_cast<unsigned char*>(std::malloc(shared_bytes));
                std::memset(machine.shared, 0xFF, shared_bytes);
                good = run_block(threads);
                std::free(machine.shared);
            }
    return good ? cudaSuccess : cudaErrorLaunchFailure;
}

// Waits for the warp; the result is the buffer that holds all its lanes' deposits. A lane cannot be two operations ahead of
// another, so two buffers do.
inline int exchange(const Fragments& mine, const char* site) {
    Fiber& fiber = machine.fibers[machine.current];
    const int buffer = fiber.warp_steps++ % 2;
    fiber.deposit[buffer] = mine;
    leave(State::warp, site);
    return buffer;
}

inline const Fragments& lane(int buffer, int index) {
    return machine.fibers[machine.current / 32 * 32 + index].deposit[buffer];
}

template <class Element> float dot_word(uint32_t a, uint32_t b);
template <> inline float dot_word<float>(uint32_t a, uint32_t b) {
    float x, y;
    std::memcpy(&x, &a, 4);
    std::memcpy(&y, &b, 4);
    return x * y;
}
template <> inline float dot_word<__half>(uint32_t a, uint32_t b) {
    return __half2float({static_cast<uint16_t>(a)}) * __half2float({static_cast<uint16_t>(b)})
           + __half2float({static_cast<uint16_t>(a >> 16)}) * __half2float({static_cast<uint16_t>(b >> 16)});
}
template <> inline float dot_word<__nv_bfloat16>(uint32_t a, uint32_t b) {
    return __bfloat162float({static_cast<uint16_t>(a)}) * __bfloat162float({static_cast<uint16_t>(b)})
           + __bfloat162float({static_cast<uint16_t>(a >> 16)}) * __bfloat162float({static_cast<uint16_t>(b >> 16)});
}

// Twin of mma.sync m16n8, fragments laid out as PTX defines them (see csrc/cuda/mma.cuh).
template <class Element, int NF> void warp_mma(float (&c)[2][NF][4], const uint32_t (&a)[2][4], const uint32_t (&b)[NF][2]) {
    Fragments mine;
    std::memcpy(mine.a, a, sizeof(a));
    std::memcpy(mine.b, b, sizeof(b));
    const int buffer = exchange(mine, "mma");
    const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    for (int m = 0; m < 2; ++m)
        for (int n = 0; n < NF; ++n)
            for (int i = 0; i < 4; ++i) {
                const int column = member * 2 + i % 2;
                float sum = c[m][n][i];
                for (int word = 0; word < 8; ++word)
                    sum += dot_word<Element>(lane(buffer, group * 4 + word % 4).a[m][i / 2 + word / 4 * 2],
                                             lane(buffer, column * 4 + word % 4).b[n][word / 4]);
                c[m][n][i] = sum;
            }
}

// Round to nearest, ties away from zero, ten bits of mantissa: cvt.rna.tf32.
inline float round_tf32(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if ((bits & 0x7F800000u) != 0x7F800000u) bits = (bits + 0x1000u) & ~0x1FFFu;
    std::memcpy(&v, &bits, 4);
    return v;
}

// Memory between two pieces of scratch, which nobody may touch.
inline void guard(void* begin, void* end) {
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(begin, static_cast<char*>(end) - static_cast<char*>(begin));
#else
    (void)begin, (void)end;
#endif
}

}  // namespace shim

#define SHIM_TEXT_(x) #x
#define SHIM_TEXT(x) SHIM_TEXT_(x)
#define __syncthreads() shim::leave(shim::State::barrier, __FILE__ ":" SHIM_TEXT(__LINE__))
#define __syncwarp() shim::leave(shim::State::warp, __FILE__ ":" SHIM_TEXT(__LINE__))
#define ADA2I_DYNAMIC_SHARED(name) unsigned char* const name = shim::machine.shared

template <class T> T __shfl_xor_sync(unsigned, T v, int mask) {   // float or double
    shim::Fragments mine;
    mine.value = v;
    const int buffer = shim::exchange(mine, "shuffle");
    return static_cast<T>(shim::lane(buffer, (threadIdx.x % 32) ^ mask).value);
}

inline const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaSuccess) return "no error";
    if (error == cudaErrorInvalidValue) return "invalid argument";
    return shim::machine.error.c_str();
}
