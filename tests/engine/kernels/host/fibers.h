// Runs the threads of a block as fibers of one CPU thread: each runs until it waits for its block or its warp.
//
// A wait that never ends is a deadlock and aborts. With a seed, fibers run in random order, so that a missing barrier
// shows as a wrong result: a GPU could use any of these orders.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <sanitizer/common_interface_defs.h>
#include <vector>
#ifndef __x86_64__
#include <ucontext.h>
#endif

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "HOST SHIM: %s\n", what);
    std::abort();
}

#ifdef __x86_64__
// Saves the registers that the ABI makes a callee preserve, switches stacks, and returns on the other one.
extern "C" void switch_stack(void** save, void* to);
asm(R"(
.text
.globl switch_stack
switch_stack:
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
)");
#endif

constexpr int WARP_SIZE = 32;
constexpr std::size_t STACK_BYTES = 1 << 18;

enum class State { READY, AT_BLOCK, AT_WARP, DONE };

struct Fiber {
#ifdef __x86_64__
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    void* fake_stack = nullptr;
    State state = State::DONE;
    unsigned collectives = 0;  // of its warp, so far
};

// Values that the lanes of a warp exchange. Two slots alternate: a lane is at most one exchange ahead of another.
struct WarpExchange {
    alignas(16) unsigned char inputs[2][WARP_SIZE][64], outputs[2][WARP_SIZE][64];
    int kind[2], arrived = 0;
};

class Block {
  public:
    std::mt19937 random;
    bool is_random = false;
    int current = 0;

    void run(int num_threads, const std::function<void()>& kernel) {
        fibers_.resize(greatest_size(num_threads));
        warps_.assign((num_threads + WARP_SIZE - 1) / WARP_SIZE, WarpExchange{});
        num_threads_ = alive_ = num_threads, at_block_ = 0, kernel_ = &kernel;
        for (int i = 0; i < num_threads; ++i) prepare(fibers_[i]);
        std::vector<int> order(num_threads);
        for (int i = 0; i < num_threads; ++i) order[i] = i;
        while (alive_ > 0) {
            bool moved = false;
            if (is_random) std::shuffle(order.begin(), order.end(), random);
            for (int i : order)
                if (fibers_[i].state == State::READY) moved = true, enter(i);
            if (!moved) fail("deadlock: some threads wait for a barrier or a warp that others never reach");
        }
    }

    void barrier() {
        if (++at_block_ == alive_) return release_block();
        wait(State::AT_BLOCK);
    }

    // Every lane contributes `size` bytes. The last to arrive runs `compute` over all; each lane gets its own result.
    template <typename Compute>
    const void* exchange(int kind, const void* inputs, std::size_t size, const Compute& compute) {
        WarpExchange& warp = warps_[current / WARP_SIZE];
        const int lane = current % WARP_SIZE, slot = fibers_[current].collectives++ % 2;
        if (warp.arrived == 0) warp.kind[slot] = kind;
        if (warp.kind[slot] != kind) fail("lanes of a warp are at different collective instructions");
        std::memcpy(warp.inputs[slot][lane], inputs, size);
        if (++warp.arrived < WARP_SIZE) {
            wait(State::AT_WARP);
        } else {
            warp.arrived = 0;
            compute(warp.inputs[slot], warp.outputs[slot]);
            for (int i = current - lane; i < current - lane + WARP_SIZE; ++i)
                if (i != current) fibers_[i].state = State::READY;
        }
        return warp.outputs[slot][lane];
    }

  private:
    std::vector<Fiber> fibers_;
    std::vector<WarpExchange> warps_;
    const std::function<void()>* kernel_ = nullptr;
    int num_threads_ = 0, alive_ = 0, at_block_ = 0;
    void* main_fake_stack_ = nullptr;
    const void* main_bottom_ = nullptr;
    std::size_t main_size_ = 0;
#ifdef __x86_64__
    void* main_pointer_ = nullptr;
#else
    ucontext_t main_context_;
#endif

    std::size_t greatest_size(int n) const { return fibers_.size() < std::size_t(n) ? n : fibers_.size(); }

    void release_block() {
        at_block_ = 0;
        for (int i = 0; i < num_threads_; ++i)
            if (fibers_[i].state == State::AT_BLOCK) fibers_[i].state = State::READY;
    }

    static void body();

    void prepare(Fiber& fiber) {
        fiber.state = State::READY, fiber.collectives = 0, fiber.fake_stack = nullptr;
#ifdef __x86_64__
        auto top = reinterpret_cast<std::uintptr_t>(fiber.stack.get() + STACK_BYTES) & ~std::uintptr_t(15);
        void** words = reinterpret_cast<void**>(top) - 8;  // six registers, the entry, and a word that aligns its frame
        for (int i = 0; i < 6; ++i) words[i] = nullptr;
        words[6] = reinterpret_cast<void*>(&Block::body);
        fiber.stack_pointer = words;
#else
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        makecontext(&fiber.context, &Block::body, 0);
#endif
    }

    void enter(int index) {
        current = index;
        Fiber& fiber = fibers_[index];
        __sanitizer_start_switch_fiber(&main_fake_stack_, fiber.stack.get(), STACK_BYTES);
#ifdef __x86_64__
        switch_stack(&main_pointer_, fiber.stack_pointer);
#else
        swapcontext(&main_context_, &fiber.context);
#endif
        __sanitizer_finish_switch_fiber(main_fake_stack_, nullptr, nullptr);
    }

    void leave(Fiber& fiber, bool for_good) {
        __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, main_bottom_, main_size_);
#ifdef __x86_64__
        switch_stack(&fiber.stack_pointer, main_pointer_);
#else
        swapcontext(&fiber.context, &main_context_);
#endif
        __sanitizer_finish_switch_fiber(fiber.fake_stack, &main_bottom_, &main_size_);
    }

    void wait(State state) {
        Fiber& fiber = fibers_[current];
        const int self = current;
        fiber.state = state;
        leave(fiber, false);
        current = self;
    }

    void finish() {
        fibers_[current].state = State::DONE;
        if (--alive_ > 0 && at_block_ == alive_) release_block();
        leave(fibers_[current], true);
        fail("a thread that had ended was resumed");
    }

    void first_steps() {
        __sanitizer_finish_switch_fiber(nullptr, &main_bottom_, &main_size_);
        (*kernel_)();
        finish();
    }
};

inline Block block;

inline void Block::body() { block.first_steps(); }
