// Times one question about one image on a FastVLM bundle's model.pte: `fastvlm-export bench --device`
// pushes this program to a phone, runs it there and reads its output.
//
// The host has done what needs Python: pixels come as raw float32, the prompt as token ids. Here is
// what a client does with them, greedily, by the methods that ExecuTorch's MultimodalRunner calls:
// vision_encoder, token_embedding, text_decoder. Each timed run prints one line in that runner's
// format, `PyTorchObserver {...}`, with what its report leaves out as further keys.

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

// The thread pool's header needs one that ExecuTorch does not install: see README.md.
#if __has_include(<executorch/extension/threadpool/threadpool.h>) && __has_include(<pthreadpool.h>)
#include <executorch/extension/threadpool/threadpool.h>
#define HAS_THREADPOOL 1
#else
#define HAS_THREADPOOL 0
#endif

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;

constexpr const char* kVision = "vision_encoder";
constexpr const char* kEmbedding = "token_embedding";
constexpr const char* kDecoder = "text_decoder";
constexpr const char* kContext = "get_max_context_len";
// The keys end in _ms as the stock runner's do; this says that they are microseconds.
constexpr int64_t kUnitsPerSecond = 1000000;

struct Options {
  std::string model, data, image, prompt;
  int64_t image_token_id = -1;
  int64_t new_tokens = 16;
  int64_t warmup = 1;
  int64_t runs = 5;
  int64_t threads = 0;  // 0: what the thread pool chooses
};

struct Run {
  int64_t start = 0, encoded = 0, prefilled = 0, first_token = 0, end = 0, sampling = 0;
  std::vector<int64_t> tokens;  // the first one included
};

[[noreturn]] void fail(const std::string& message) {
  throw std::runtime_error(message);
}

int64_t now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::microseconds>(since).count();
}

void check(Error error, const std::string& what) {
  if (error != Error::Ok) {
    fail(what + " failed with ExecuTorch error " + std::to_string(static_cast<int>(error)));
  }
}

int64_t integer(const std::string& name, const std::string& text) {
  size_t used = 0;
  int64_t value = -1;
  try {
    value = std::stoll(text, &used);
  } catch (const std::exception&) {
  }
  if (text.empty() || used != text.size() || value < 0) {
    fail(name + " " + text + ": not a number of 0 or more");
  }
  return value;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int at = 1; at < argc; at += 2) {
    const std::string name = argv[at];
    if (at + 1 == argc) {
      fail(name + ": its value is missing");
    }
    const std::string value = argv[at + 1];
    if (name == "--model") {
      options.model = value;
    } else if (name == "--data") {
      options.data = value;
    } else if (name == "--image") {
      options.image = value;
    } else if (name == "--prompt") {
      options.prompt = value;
    } else if (name == "--image-token-id") {
      options.image_token_id = integer(name, value);
    } else if (name == "--new-tokens") {
      options.new_tokens = integer(name, value);
    } else if (name == "--warmup") {
      options.warmup = integer(name, value);
    } else if (name == "--runs") {
      options.runs = integer(name, value);
    } else if (name == "--threads") {
      options.threads = integer(name, value);
    } else {
      fail(name + ": there is no such option");
    }
  }
  if (options.model.empty() || options.image.empty() || options.prompt.empty() ||
      options.image_token_id < 0) {
    fail("--model, --image, --prompt and --image-token-id are needed");
  }
  return options;
}

// The pixels that the encoder takes, as they lie in the file: float32, [3,R,R].
std::vector<float> read_pixels(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) {
    fail(path + " cannot be read");
  }
  const auto bytes = static_cast<size_t>(file.tellg());
  std::vector<float> pixels(bytes / sizeof(float));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(pixels.data()), pixels.size() * sizeof(float));
  if (!file || bytes % sizeof(float) != 0) {
    fail(path + " is not float32 pixels");
  }
  return pixels;
}

// Token ids, separated by white space.
std::vector<int64_t> read_prompt(const std::string& path) {
  std::ifstream file(path);
  std::vector<int64_t> ids;
  for (std::string word; file >> word;) {
    ids.push_back(integer(path, word));
  }
  if (ids.empty()) {
    fail(path + " holds no token ids");
  }
  return ids;
}

// The most memory that this process has held, in bytes; 0 where the system does not say.
int64_t peak_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    int64_t kilobytes = 0;
    if (word == "VmHWM:" && status >> kilobytes) {
      return kilobytes * 1024;
    }
  }
  return 0;
}

// How many there are; 0 where it was built without the thread pool's header.
int64_t set_threads(int64_t wanted) {
#if HAS_THREADPOOL
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (wanted > 0) {
    pool->_unsafe_reset_threadpool(static_cast<uint32_t>(wanted));
  }
  return static_cast<int64_t>(pool->get_thread_count());
#else
  if (wanted > 0) {
    fail("--threads: this runner was built without ExecuTorch's threadpool.h and pthreadpool.h");
  }
  return 0;
#endif
}

class Model {
 public:
  explicit Model(const Options& options)
      : module_(
            options.data.empty()
                ? std::make_unique<Module>(options.model, Module::LoadMode::Mmap)
                : std::make_unique<Module>(
                      options.model, options.data, Module::LoadMode::Mmap)),
        image_token_id_(options.image_token_id) {
    for (const char* name : {kVision, kEmbedding, kDecoder}) {
      check(module_->load_method(name), std::string("loading ") + name);
    }
    image_shape_ = shape(kVision, 0);
    // A decoder may be told every position or the first one only: as the stock runner, ask it.
    const auto positions = shape(kDecoder, 1);
    every_position_ = std::accumulate(
        positions.begin(), positions.end(), int64_t{1}, std::multiplies<>()) > 1;
  }

  // Positions that a conversation may take; 0 where the program does not say.
  int64_t context() {
    const auto names = module_->method_names();
    if (!names.ok() || names->count(kContext) == 0) {
      return 0;
    }
    const auto found = module_->get(kContext);
    check(found.error(), kContext);
    return found->toInt();
  }

  Run ask(std::vector<float>& pixels, const std::vector<int64_t>& prompt, int64_t new_tokens) {
    Run run;
    position_ = 0;
    run.start = now();
    const std::vector<float> features = encode(pixels);
    run.encoded = now();
    std::vector<float> embeds = embed(prompt, /*splice=*/true);
    splice(embeds, features, prompt);
    Tensor logits = decode(embeds, static_cast<int64_t>(prompt.size()));
    run.prefilled = now();
    run.tokens.push_back(best(logits));
    run.first_token = now();
    run.sampling = run.first_token - run.prefilled;
    for (int64_t count = 0; count < new_tokens; ++count) {
      std::vector<float> step = embed({run.tokens.back()}, /*splice=*/false);
      logits = decode(step, 1);
      const int64_t before = now();
      run.tokens.push_back(best(logits));
      run.sampling += now() - before;
    }
    run.end = now();
    return run;
  }

 private:
  std::vector<SizesType> shape(const char* method, size_t input) {
    const auto meta = module_->method_meta(method);
    check(meta.error(), std::string("reading ") + method);
    const auto tensor = meta->input_tensor_meta(input);
    check(tensor.error(), std::string("reading the inputs of ") + method);
    const auto sizes = tensor->sizes();
    return {sizes.begin(), sizes.end()};
  }

  Tensor execute(const char* method, const std::vector<EValue>& inputs) {
    auto outputs = module_->execute(method, inputs);
    check(outputs.error(), method);
    if (outputs->empty() || !outputs->at(0).isTensor() ||
        outputs->at(0).toTensor().scalar_type() != ScalarType::Float) {
      fail(std::string(method) + " does not give a float32 tensor");
    }
    return outputs->at(0).toTensor();
  }

  std::vector<float> encode(std::vector<float>& pixels) {
    const int64_t expected = std::accumulate(
        image_shape_.begin(), image_shape_.end(), int64_t{1}, std::multiplies<>());
    if (expected != static_cast<int64_t>(pixels.size())) {
      fail("the image has " + std::to_string(pixels.size()) + " numbers, the encoder takes " +
           std::to_string(expected));
    }
    const auto input = from_blob(pixels.data(), image_shape_, ScalarType::Float);
    const Tensor features = execute(kVision, {*input});
    const float* data = features.const_data_ptr<float>();
    return {data, data + features.numel()};
  }

  // [S] ids -> [S * D]; an image token stands for no text, so token 0 takes its place.
  std::vector<float> embed(std::vector<int64_t> ids, bool splice) {
    if (splice) {
      std::replace(ids.begin(), ids.end(), image_token_id_, int64_t{0});
    }
    const auto input =
        from_blob(ids.data(), {1, static_cast<SizesType>(ids.size())}, ScalarType::Long);
    const Tensor embeds = execute(kEmbedding, {*input});
    const float* data = embeds.const_data_ptr<float>();
    return {data, data + embeds.numel()};
  }

  // Put the i-th row of features where the i-th image token is.
  void splice(std::vector<float>& embeds, const std::vector<float>& features,
              const std::vector<int64_t>& prompt) const {
    const size_t width = embeds.size() / prompt.size();
    const auto places =
        static_cast<size_t>(std::count(prompt.begin(), prompt.end(), image_token_id_));
    if (places * width != features.size()) {
      fail("the prompt has " + std::to_string(places) + " image tokens, the encoder gives " +
           std::to_string(features.size() / width));
    }
    auto row = features.begin();
    for (size_t at = 0; at < prompt.size(); ++at) {
      if (prompt[at] == image_token_id_) {
        std::copy(row, row + width, embeds.begin() + at * width);
        row += width;
      }
    }
  }

  // [S * D] at the positions after those so far -> logits, the last position's last.
  Tensor decode(std::vector<float>& embeds, int64_t length) {
    const auto size = static_cast<SizesType>(length);
    const auto width = static_cast<SizesType>(embeds.size() / length);
    std::vector<int64_t> positions(every_position_ ? length : 1);
    std::iota(positions.begin(), positions.end(), position_);
    const auto input = from_blob(embeds.data(), {1, size, width}, ScalarType::Float);
    const auto places = from_blob(
        positions.data(), {static_cast<SizesType>(positions.size())}, ScalarType::Long);
    position_ += length;
    return execute(kDecoder, {*input, *places});
  }

  static int64_t best(const Tensor& logits) {
    const int64_t width = logits.size(logits.dim() - 1);
    const float* last = logits.const_data_ptr<float>() + logits.numel() - width;
    return std::max_element(last, last + width) - last;
  }

  std::unique_ptr<Module> module_;
  int64_t image_token_id_;
  std::vector<SizesType> image_shape_;
  bool every_position_ = false;
  int64_t position_ = 0;
};

void print(const Run& run, int64_t prompt_tokens, int64_t load_start, int64_t load_end,
           int64_t threads) {
  const auto number = [](const char* key, int64_t value) {
    return std::string("\"") + key + "\":" + std::to_string(value) + ",";
  };
  std::string tokens;
  for (const int64_t token : run.tokens) {
    tokens += (tokens.empty() ? "" : ",") + std::to_string(token);
  }
  // As the stock runner counts: the token that prefill ends in is not among the generated.
  std::string line = number("prompt_tokens", prompt_tokens) +
      number("generated_tokens", static_cast<int64_t>(run.tokens.size()) - 1) +
      number("model_load_start_ms", load_start) + number("model_load_end_ms", load_end) +
      number("inference_start_ms", run.start) + number("inference_end_ms", run.end) +
      number("prompt_eval_end_ms", run.prefilled) + number("first_token_ms", run.first_token) +
      number("aggregate_sampling_time_ms", run.sampling) +
      number("image_encode_end_ms", run.encoded) + number("peak_memory_bytes", peak_memory()) +
      number("threads", threads) + "\"tokens\":[" + tokens + "]," +
      "\"SCALING_FACTOR_UNITS_PER_SECOND\":" + std::to_string(kUnitsPerSecond);
  std::printf("PyTorchObserver {%s}\n", line.c_str());
  std::fflush(stdout);
}

void bench(const Options& options) {
  std::vector<float> pixels = read_pixels(options.image);
  const std::vector<int64_t> prompt = read_prompt(options.prompt);
  const int64_t threads = set_threads(options.threads);
  const auto length = static_cast<int64_t>(prompt.size());
  const int64_t load_start = now();
  Model model(options);
  const int64_t load_end = now();
  const int64_t context = model.context();
  if (context > 0 && length + options.new_tokens > context) {
    fail("prompt and new tokens take " + std::to_string(length + options.new_tokens) + " of " +
         std::to_string(context) + " positions");
  }
  for (int64_t count = 0; count < options.warmup; ++count) {
    model.ask(pixels, prompt, options.new_tokens);
  }
  for (int64_t count = 0; count < options.runs; ++count) {
    print(model.ask(pixels, prompt, options.new_tokens), length, load_start, load_end, threads);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    bench(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fastvlm_runner: %s\n", error.what());
    return 2;
  }
  return 0;
}
