/* Work that is enqueued: done at once, or kept as a graph for replays. */
#include <memory>
#include <string.h>
#include <vector>

#include "../control.h"
#include "../device/runtime_api.h"

struct hqqlora_emulated_graph {
    std::vector<std::function<cudaError_t()>> work;
};

static thread_local std::unique_ptr<hqqlora_emulated_graph> captured;

cudaError_t on_cpu::enqueue(std::function<cudaError_t()> work)
{
    if (!captured) return work();
    captured->work.push_back(std::move(work));
    return cudaSuccess;
}

void hqqlora_emulated_enqueue(void (*work)(void *), const void *arguments, size_t bytes)
{
    const char *from = static_cast<const char *>(arguments);
    on_cpu::enqueue([work, copy = std::vector<char>(from, from + bytes)]() mutable {
        work(copy.data());
        return cudaSuccess;
    });
}

void hqqlora_emulated_begin_capture(void)
{
    captured = std::make_unique<hqqlora_emulated_graph>();
}

hqqlora_emulated_graph *hqqlora_emulated_end_capture(void)
{
    return captured.release();
}

int hqqlora_emulated_replay(hqqlora_emulated_graph *graph)
{
    for (auto &work : graph->work) {
        cudaError_t error = work();
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

void hqqlora_emulated_destroy_graph(hqqlora_emulated_graph *graph)
{
    delete graph;
}
