// How fast this device reads its memory and multiplies: what edgedistill/ceilings_child.py measures
// with numpy, here with plain reads and ggml's own product of float32 matrices.

#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <thread>

#include <sys/mman.h>

#include "ggml-cpu.h"
#include "ggml.h"
#include "native.h"

constexpr int SIDE = 1024;  // of the matrices, as in ceilings_child.py

inline volatile uint64_t read_sum;  // what was read is used, or no compiler would read it

// Seconds of the fastest pass behind the first one, which warms up.
inline double best_of(int passes, const std::function<void()> & work) {
    double best = std::numeric_limits<double>::infinity();
    for (int pass = 0; pass <= passes; pass++) {
        const double started = now();
        work();
        best = pass == 0 ? best : std::min(best, now() - started);
    }
    return best;
}

constexpr size_t HUGE_PAGE = 2 << 20;
constexpr int SUMS = 8;  // of one alone, each addition waits for the one before

struct Unmapped {
    void operator()(uint64_t * words) const { operator delete(words, std::align_val_t(HUGE_PAGE)); }
};

using Words = std::unique_ptr<uint64_t[], Unmapped>;

// Ones in huge pages, where the system has them, as numpy's arrays are: with small ones the
// processor looks up an address for every 4 KB, and that was timed more than the memory.
inline Words words_of(size_t count) {
    const size_t bytes = (count * sizeof(uint64_t) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    Words words(static_cast<uint64_t *>(operator new(bytes, std::align_val_t(HUGE_PAGE))));
#ifdef MADV_HUGEPAGE
    madvise(words.get(), bytes, MADV_HUGEPAGE);
#endif
    std::fill_n(words.get(), count, 1);
    return words;
}

// `count` is a multiple of SUMS.
inline uint64_t sum_of(const uint64_t * words, size_t count) {
    uint64_t sums[SUMS] = {};
    for (size_t i = 0; i < count; i += SUMS) {
        for (int k = 0; k < SUMS; k++) {
            sums[k] += words[i + k];
        }
    }
    uint64_t sum = 0;
    for (const uint64_t each : sums) {
        sum += each;
    }
    return sum;
}

// Bytes a second, of threads that each read an array of its own. They are started first and then
// let go at once: starting one takes longer than reading some megabytes.
inline double bytes_per_second(int threads, int megabytes, int passes) {
    const size_t words = (size_t) megabytes * 1000000 / sizeof(uint64_t) / SUMS * SUMS;
    std::vector<Words> arrays;
    for (int i = 0; i < threads; i++) {
        arrays.push_back(words_of(words));
    }
    std::atomic<int> pass{0}, done{0};
    std::vector<std::thread> every;
    for (int i = 0; i < threads; i++) {
        every.emplace_back([&, i] {
            for (int mine = 1; mine <= passes + 1; mine++) {
                while (pass.load() < mine) {
                    std::this_thread::yield();
                }
                read_sum = sum_of(arrays[i].get(), words);
                done++;
            }
        });
    }
    const double seconds = best_of(passes, [&] {
        const int whole = (pass.load() + 1) * threads;
        pass++;
        while (done.load() < whole) {
            std::this_thread::yield();
        }
    });
    for (std::thread & each : every) {
        each.join();
    }
    return threads * (double) words * sizeof(uint64_t) / seconds;
}

// Multiplications and additions a second.
inline double flops(int threads, int passes) {
    const size_t columns = (size_t) SIDE * threads;
    const size_t room = (2 * columns + SIDE) * SIDE * sizeof(float) + (size_t) (1 << 20);
    ggml_context * context = ggml_init({room, nullptr, false});
    ggml_tensor * left = ggml_new_tensor_2d(context, GGML_TYPE_F32, SIDE, SIDE);
    ggml_tensor * right = ggml_new_tensor_2d(context, GGML_TYPE_F32, SIDE, columns);
    for (ggml_tensor * each : {left, right}) {
        std::fill_n(static_cast<float *>(each->data), ggml_nelements(each), 0.5f);
    }
    ggml_cgraph * graph = ggml_new_graph(context);
    ggml_build_forward_expand(graph, ggml_mul_mat(context, left, right));
    ggml_cplan plan = ggml_graph_plan(graph, threads, nullptr);
    std::vector<uint8_t> work(plan.work_size);
    plan.work_data = work.data();
    const double seconds = best_of(passes, [&] { ggml_graph_compute(graph, &plan); });
    ggml_free(context);
    return 2.0 * SIDE * SIDE * columns / seconds;
}

inline json measure(int threads, int megabytes, int passes) {
    return {
        {"bytes_per_second", bytes_per_second(threads, megabytes, passes)},
        {"flops", flops(threads, passes)},
    };
}
