/* An allocator for PyTorch's CPU tensors whose freed memory serves the next tensor of its size; see allocator.py.

   A chunk of malloc's, 64 bytes larger than asked for. The data begins at its first multiple of 64, as PyTorch's own
   allocator has it, and the address of the chunk is kept in the 8 bytes before the data. */
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstdlib>

namespace {

constexpr size_t ALIGNMENT = 64; // malloc's own is 16: at least that lies before the data

void release(void *data)
{
    if (!data)
        return;
    c10::profiledCPUMemoryReporter().Delete(data);
    std::free(static_cast<void **>(data)[-1]);
}

struct Allocator final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override
    {
        void *data = nullptr;
        if (bytes) {
            char *chunk = bytes + ALIGNMENT > bytes ? static_cast<char *>(std::malloc(bytes + ALIGNMENT)) : nullptr;
            TORCH_CHECK(chunk, "can't allocate memory: you tried to allocate ", bytes, " bytes");
            data = chunk + ALIGNMENT - reinterpret_cast<uintptr_t>(chunk) % ALIGNMENT;
            static_cast<void **>(data)[-1] = chunk;
            c10::profiledCPUMemoryReporter().New(data, bytes);
        }
        return {data, data, release, c10::Device(c10::DeviceType::CPU)};
    }

    c10::DeleterFnPtr raw_deleter() const override { return release; }

    void copy_data(void *to, const void *from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Allocator allocator;

} // namespace

extern "C" __attribute__((visibility("default"))) void qloralab_install_allocator()
{
    c10::SetCPUAllocator(&allocator, /*priority=*/1);
}
