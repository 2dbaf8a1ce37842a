// One loaded model with one context, and what may be asked of it: the class of that name in
// runtime_child.py, in C++.

#pragma once

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <functional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "llama.h"

using json = nlohmann::ordered_json;

// The same as in runtime_child.py.
constexpr int BATCH = 512;
constexpr int OUTPUTS = 64;

struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct FileRefused {
    int number;
    std::string file;
};

inline std::string loading;  // what llama.cpp said about the buffers it put the weights into
inline bool timed = true;  // false: nothing about time is told

inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class Native {
public:
    Native(const std::string & path, int threads, int context_tokens) {
        const double started = now();
        model = llama_model_load_from_file(path.c_str(), llama_model_default_params());
        if (!model) {
            throw Refused("llama.cpp cannot load this file");
        }
        vocab = llama_model_get_vocab(model);
        n_vocab = llama_vocab_n_tokens(vocab);
        llama_context_params options = llama_context_default_params();
        options.n_ctx = context_tokens;
        options.n_batch = options.n_ubatch = BATCH;
        options.n_outputs_max = OUTPUTS;
        options.n_threads = options.n_threads_batch = threads;
        context = llama_init_from_model(model, options);
        if (!context) {
            throw Refused("llama.cpp cannot make a context of " + std::to_string(context_tokens) + " tokens");
        }
        n_ctx = llama_n_ctx(context);
        batch = llama_batch_init(BATCH, 0, 1);
        load_seconds = now() - started;
    }

    json facts() const {
        char text[256];
        llama_model_desc(model, text, sizeof text);
        json found = {
            {"n_vocab", n_vocab},
            {"n_ctx", n_ctx},
            {"description", text},
            {"size", llama_model_size(model)},
            {"parameters", llama_model_n_params(model)},
            {"threads", llama_n_threads(context)},
            {"bos", llama_vocab_bos(vocab)},
            {"eos", llama_vocab_eos(vocab)},
            {"add_bos", llama_vocab_get_add_bos(vocab)},
            {"add_eos", llama_vocab_get_add_eos(vocab)},
            {"kernels", llama_print_system_info()},
            {"buffers", loading},
        };
        if (timed) {
            found["load_seconds"] = load_seconds;
        }
        return found;
    }

    json end_ids() const {
        json found = json::array();
        for (int i = 0; i < n_vocab; i++) {
            if (llama_vocab_is_eog(vocab, i)) {
                found.push_back(i);
            }
        }
        return found;
    }

    json metadata() const {
        json found = json::object();
        for (int i = 0; i < llama_model_meta_count(model); i++) {
            found[text_of(llama_model_meta_key_by_index, i)] = text_of(llama_model_meta_val_str_by_index, i);
        }
        return found;
    }

    json tokenize(const std::string & text) const {
        std::vector<llama_token> ids(text.size() + 8);
        const int count = llama_tokenize(vocab, text.data(), text.size(), ids.data(), ids.size(), false, true);
        if (count < 0) {
            throw Refused("llama.cpp cannot tokenize a text of " + std::to_string(text.size()) + " bytes");
        }
        ids.resize(count);
        return ids;
    }

    std::string detokenize(const std::vector<llama_token> & ids) const {
        known(ids);
        std::string text(16 * ids.size() + 64, '\0');
        int count = llama_detokenize(vocab, ids.data(), ids.size(), text.data(), text.size(), false, true);
        if (count < 0) {
            text.resize(-count);
            count = llama_detokenize(vocab, ids.data(), ids.size(), text.data(), text.size(), false, true);
        }
        text.resize(count);
        return text;
    }

    json generate(const std::vector<llama_token> & ids, int max_tokens, const std::set<llama_token> & stop) {
        fits(ids.size() + max_tokens);
        known(ids);
        std::vector<llama_token> made;
        std::vector<double> token_seconds;
        const double started = now();
        clear();
        prefill(ids, ids.size(), ids.size() - 1);
        llama_token token = likely(-1);
        const double first = now();
        double ended = first;
        while (!stop.count(token)) {
            made.push_back(token);
            if ((int) made.size() >= max_tokens) {
                break;
            }
            decode(&token, 1, ids.size() + made.size() - 1, 0, 1);
            token = likely(-1);
            const double tick = now();
            token_seconds.push_back(tick - ended);
            ended = tick;
        }
        json found = {
            {"ids", made},
            {"text", made.empty() ? "" : detokenize(made)},
            {"stopped", stop.count(token) > 0},
            {"time_to_first_token", timed ? first - started : 0.0},
            {"total_seconds", timed ? ended - started : 0.0},
            {"decode_seconds", timed ? ended - first : 0.0},
        };
        if (timed) {
            found["token_seconds"] = token_seconds;
        }
        return found;
    }

    // llama-bench's convention, as in runtime_child.py.
    json bench(int pp, int tg, int runs, int depth) {
        fits(depth + std::max(pp, tg));
        const std::vector<uint8_t> before = filled(chosen(depth));
        const auto prompt = [&] { prefill(chosen(pp), pp, pp - 1, depth); };
        const auto decoding = [&] {
            for (int position = depth; position < depth + tg; position++) {
                decode(chosen(1).data(), 1, position, 0, 1);
                llama_synchronize(context);
            }
        };
        return {{"pp", rates(prompt, pp, runs, before)}, {"tg", rates(decoding, tg, runs, before)}};
    }

    json logits(const std::vector<llama_token> & ids, int first, const std::string & into) {
        const int count = ids.size();
        fits(count);
        known(ids);
        if (first <= 0 || first >= count) {
            throw Refused("cannot give logits from position " + std::to_string(first) + " of " +
                          std::to_string(count) + " tokens");
        }
        clear();
        prefill(ids, first - 1, first - 1);
        json best = json::array();
        std::FILE * stream = std::fopen(into.c_str(), "ab");
        if (!stream) {
            throw FileRefused{errno, into};
        }
        for (int start = first - 1; start < count - 1; start += OUTPUTS) {
            const int size = std::min(OUTPUTS, count - 1 - start);
            decode(&ids[start], size, start, 0, size);
            for (int j = 0; j < size; j++) {
                const float * row = llama_get_logits_ith(context, j);
                if (std::fwrite(row, sizeof(float), n_vocab, stream) != (size_t) n_vocab) {
                    const int number = errno;
                    std::fclose(stream);
                    throw FileRefused{number, into};
                }
                best.push_back(likely(j));
            }
        }
        if (std::fclose(stream) != 0) {
            throw FileRefused{errno, into};
        }
        return best;
    }

private:
    llama_model * model = nullptr;
    const llama_vocab * vocab = nullptr;
    llama_context * context = nullptr;
    llama_batch batch = {};
    int n_vocab = 0;
    int n_ctx = 0;
    double load_seconds = 0.0;
    std::minstd_rand chance;

    void clear() {
        llama_memory_clear(llama_get_memory(context), false);
    }

    std::vector<llama_token> chosen(int count) {
        std::vector<llama_token> ids(count);
        std::generate(ids.begin(), ids.end(), [this] { return (llama_token) (chance() % n_vocab); });
        return ids;
    }

    // Tokens a second of each run behind the first one, which warms up.
    std::vector<double> rates(const std::function<void()> & work, int tokens, int runs,
                              const std::vector<uint8_t> & before) {
        std::vector<double> found;
        for (int run = 0; tokens > 0 && run <= runs; run++) {
            restore(before);
            const double started = now();
            work();
            llama_synchronize(context);
            if (run > 0) {
                found.push_back(tokens / (now() - started));
            }
        }
        return found;
    }

    // The cache's state behind these tokens, computed once for all runs; empty for no tokens.
    std::vector<uint8_t> filled(const std::vector<llama_token> & ids) {
        std::vector<uint8_t> state;
        if (ids.empty()) {
            return state;
        }
        clear();
        prefill(ids, ids.size(), ids.size() - 1);
        state.resize(llama_state_seq_get_size(context, 0));
        if (llama_state_seq_get_data(context, state.data(), state.size(), 0) != state.size()) {
            throw Refused("llama.cpp cannot keep its state behind " + std::to_string(ids.size()) + " tokens");
        }
        return state;
    }

    void restore(const std::vector<uint8_t> & state) {
        clear();
        if (!state.empty() && !llama_state_seq_set_data(context, state.data(), state.size(), 0)) {
            throw Refused("llama.cpp cannot take back the state that it gave");
        }
    }

    // Decode the first `count` of `ids` from position `behind`; logits are computed for the one at
    // `wanted` in `ids` alone.
    void prefill(const std::vector<llama_token> & ids, int count, int wanted, int behind = 0) {
        for (int start = 0; start < count; start += BATCH) {
            const int size = std::min(BATCH, count - start);
            decode(&ids[start], size, behind + start, wanted - start, wanted - start + 1);
        }
    }

    // Logits are computed for the tokens from `from` up to `to`.
    void decode(const llama_token * ids, int count, int position, int from, int to) {
        batch.n_tokens = count;
        for (int j = 0; j < count; j++) {
            batch.token[j] = ids[j];
            batch.pos[j] = position + j;
            batch.n_seq_id[j] = 1;
            batch.seq_id[j][0] = 0;
            batch.logits[j] = from <= j && j < to;
        }
        const int code = llama_decode(context, batch);
        if (code != 0) {
            throw Refused("llama_decode failed with code " + std::to_string(code));
        }
    }

    llama_token likely(int index) const {
        const float * row = llama_get_logits_ith(context, index);
        return std::max_element(row, row + n_vocab) - row;
    }

    void fits(int tokens) const {
        if (tokens > n_ctx) {
            throw Refused(std::to_string(tokens) + " tokens do not fit into the context of " +
                          std::to_string(n_ctx) + " tokens");
        }
    }

    void known(const std::vector<llama_token> & ids) const {
        if (ids.empty()) {
            throw Refused("there are no tokens");
        }
        for (const llama_token id : ids) {
            if (id < 0 || id >= n_vocab) {
                throw Refused("a token ID is outside the vocabulary of " + std::to_string(n_vocab) + " tokens");
            }
        }
    }

    template <typename Read> std::string text_of(Read read, int index) const {
        char one[1];
        std::string text(read(model, index, one, sizeof one) + 1, '\0');
        read(model, index, text.data(), text.size());
        text.pop_back();
        return text;
    }
};
