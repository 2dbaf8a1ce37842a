// llama.cpp behind the requests of runtime_child.py, as one static program for another device: a
// JSON request a line on stdin, a JSON answer a line on what was stdout. Each request does what the
// function of that name does there, with the same batches, so that two devices differ by their
// kernels and their speed alone.
//
//     runner              answers requests until its stdin is closed
//     runner --untimed    the same, without anything about time: an emulated processor has no speed
//     runner --version    prints what it was made from, and ends

#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <deque>
#include <fstream>
#include <iostream>
#include <mutex>
#include <string>
#include <thread>

#include <sys/resource.h>
#include <unistd.h>

#include "ceilings.h"
#include "native.h"

// What CMakeLists.txt was told; a runner of the user's own may know neither.
#ifndef RUNNER_SOURCES
#define RUNNER_SOURCES ""
#endif
#ifndef RUNNER_MARCH
#define RUNNER_MARCH ""
#endif

// Requests as they come; a closed stdin ends the process at once, whatever it is doing.
class Requests {
public:
    Requests() {
        std::thread([this] {
            std::string line;
            while (std::getline(std::cin, line)) {
                const std::lock_guard<std::mutex> hold(guard);
                waiting.push_back(line);
                ready.notify_one();
            }
            _exit(0);
        }).detach();
    }

    std::string next() {
        std::unique_lock<std::mutex> hold(guard);
        ready.wait(hold, [this] { return !waiting.empty(); });
        std::string line = std::move(waiting.front());
        waiting.pop_front();
        return line;
    }

private:
    std::mutex guard;
    std::condition_variable ready;
    std::deque<std::string> waiting;
};

// Unbuffered: what was said last is there when the process aborts.
static void say(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_DEBUG || level == GGML_LOG_LEVEL_CONT) {
        return;
    }
    if (std::strstr(text, "model buffer size")) {
        loading += text;
    }
    [[maybe_unused]] const ssize_t written = write(2, text, std::strlen(text));
}

// Largest resident size so far. Linux' own count is of this program; rusage's is also of the one
// that became it.
static json peak_memory_bytes() {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
        if (line.rfind("VmHWM:", 0) == 0) {
            return std::stoll(line.substr(6)) * 1024;
        }
    }
    struct rusage used = {};
    getrusage(RUSAGE_SELF, &used);
#ifdef __APPLE__
    return used.ru_maxrss;
#else
    return used.ru_maxrss * 1024;
#endif
}

// What a request holds goes on as it is: a default or a rule that shapes an answer belongs into
// native.h, by which kept answers of emulated devices are told (SHAPING in __init__.py).
static json answer(Native *& native, const json & given) {
    const std::string name = given.at("do");
    if (name == "load") {
        native = new Native(given.at("path"), given.at("threads"), given.at("context_tokens"));
        return native->facts();
    }
    if (name == "measure" && timed) {
        return measure(given.at("threads"), given.at("megabytes"), given.at("passes"));
    }
    if (!native) {
        throw Refused("no model is loaded");
    }
    if (name == "metadata") {
        return native->metadata();
    }
    if (name == "end_ids") {
        return native->end_ids();
    }
    if (name == "tokenize") {
        return native->tokenize(given.at("text"));
    }
    if (name == "detokenize") {
        return native->detokenize(given.at("ids"));
    }
    if (name == "generate") {
        return native->generate(given.at("ids"), given.at("max_tokens"), given.at("stop_ids"));
    }
    if (name == "logits") {
        return native->logits(given.at("ids"), given.at("first"), given.at("into"));
    }
    if (name == "bench" && timed) {
        const int depth = given.value("depth", 0);
        return native->bench(given.at("pp"), given.at("tg"), given.at("runs"), depth);
    }
    if (name == "peak_memory_bytes" && timed) {
        return peak_memory_bytes();
    }
    throw Refused(timed ? "this runner does not know '" + name + "'" : "this is not done on an emulated processor");
}

int main(int count, char ** words) {
    const std::string option = count > 1 ? words[1] : "";
    if (option == "--version") {
        const json made = {{"runner", "edgedistill"}, {"sources", RUNNER_SOURCES}, {"march", RUNNER_MARCH}};
        std::cout << made.dump() << std::endl;
        return 0;
    }
    if (count > 2 || !(option.empty() || option == "--untimed")) {
        std::cerr << "usage: runner [--untimed | --version]" << std::endl;
        return 2;
    }
    timed = option.empty();
    std::FILE * answers = fdopen(dup(1), "w");
    dup2(2, 1);  // native code prints where it likes; answers have a handle of their own
    std::signal(SIGINT, SIG_IGN);  // the parent decides what Ctrl-C means
    llama_log_set(say, nullptr);
    llama_backend_init();
    Native * native = nullptr;
    Requests requests;
    while (true) {
        json said;
        try {
            said["ok"] = answer(native, json::parse(requests.next()));
        } catch (const Refused & error) {
            said = {{"error", error.what()}};
        } catch (const FileRefused & error) {
            said = {{"error", std::strerror(error.number)}, {"errno", error.number}, {"file", error.file}};
        } catch (const json::exception & error) {
            said = {{"error", error.what()}};
        }
        const std::string line = said.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
        std::fwrite(line.data(), 1, line.size(), answers);
        std::fflush(answers);
    }
}
