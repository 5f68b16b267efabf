// Runs kernels on this CPU for the tests: reads requests from standard input, writes the buffers to standard output.
//
// Every buffer is a separate allocation, so that the address sanitizer finds any access beside it. Built with
// -DSOURCE='"x.cu"'. A request, in order:
//     u32 length of the kernel's name, the name;  u32 blocks, threads, shared bytes, seed (0: fibers in order)
//     u32 buffers;  for each: u64 bytes, its bytes (the launch's struct is buffer 0)
//     u32 pointers; for each: u32 buffer and u64 offset where it stands, u32 buffer and u64 offset that it points to
// The answer: the bytes of all buffers but the struct, in order.
#define MUXTUNE_ON_HOST
#include SOURCE

#include <unistd.h>

struct Buffer {
    std::unique_ptr<char, void (*)(void*)> data{nullptr, std::free};
    u64 size = 0;

    void allocate(u64 bytes) {
        size = bytes;
        void* p = nullptr;
        if (posix_memalign(&p, 256, bytes ? bytes : 1)) fail("out of memory");  // as torch's own allocations
        data.reset(static_cast<char*>(p));
    }
};

static void read_all(void* to, std::size_t size) {
    if (size && std::fread(to, 1, size, stdin) != size) fail("a request was cut short");
}
template <typename T>
static T read_one() {
    T value;
    read_all(&value, sizeof value);
    return value;
}

static void run(const Registered& kernel, const void* launch, u32 shared_bytes, u32 seed) {
    block.is_random = seed != 0;
    block.random.seed(seed);
    std::vector<int> order(launched.num_blocks);
    for (int i = 0; i < launched.num_blocks; ++i) order[i] = i;
    if (seed) std::shuffle(order.begin(), order.end(), block.random);
    for (int index : order) {
        Buffer shared;
        shared.allocate(shared_bytes);
        std::memset(shared.data.get(), 0xff, shared_bytes);
        launched.block_index = index, launched.shared_memory = shared.data.get();
        launched.copies.assign(launched.num_threads, {{}});
        block.run(launched.num_threads, [&] { kernel.run(launch); });
        for (const auto& groups : launched.copies)
            for (const auto& group : groups)
                if (!group.empty()) fail("a copy was never waited for");
    }
}

int main() {
    for (int c; (c = std::getc(stdin)) != EOF;) {
        std::ungetc(c, stdin);
        std::string name(read_one<u32>(), ' ');
        read_all(name.data(), name.size());
        launched.num_blocks = read_one<u32>(), launched.num_threads = read_one<u32>();
        const u32 shared_bytes = read_one<u32>(), seed = read_one<u32>();
        std::vector<Buffer> buffers(read_one<u32>());
        for (Buffer& buffer : buffers) {
            buffer.allocate(read_one<u64>());
            read_all(buffer.data.get(), buffer.size);
        }
        for (u32 left = read_one<u32>(); left > 0; --left) {
            const u32 in = read_one<u32>();
            const u64 at = read_one<u64>();
            const u32 to = read_one<u32>();
            const char* target = buffers.at(to).data.get() + read_one<u64>();
            std::memcpy(buffers.at(in).data.get() + at, &target, sizeof target);
        }
        const auto found = kernels().find(name);
        if (found == kernels().end()) fail("no such kernel");
        if (found->second.size != buffers.at(0).size) fail("the launch's struct has another size");
        run(found->second, buffers[0].data.get(), shared_bytes, seed);
        for (std::size_t i = 1; i < buffers.size(); ++i) std::fwrite(buffers[i].data.get(), 1, buffers[i].size, stdout);
        std::fflush(stdout);
    }
}
