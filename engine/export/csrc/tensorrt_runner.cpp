// Runs the TensorRT plans of a bundle: loads them, shows their tensors, times them. (Not run here.)
//
//   focus_runner BUNDLE [PART ...] [--repeats N]
//
// Every plan runs at the optimum of its first profile, inside a CUDA graph. Plugins are compiled into
// the plans ahead of time, so neither Python nor a plugin library is needed.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

namespace trt = nvinfer1;

class Log : public trt::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", message);
  }
};

void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
  }
}

struct Buffer {
  void* data = nullptr;
  explicit Buffer(size_t bytes) { check(cudaMalloc(&data, std::max<size_t>(bytes, 1)), "cudaMalloc"); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }
};

int64_t bits(trt::DataType type) {
  switch (type) {
    case trt::DataType::kINT64:
      return 64;
    case trt::DataType::kFLOAT:
    case trt::DataType::kINT32:
      return 32;
    case trt::DataType::kHALF:
    case trt::DataType::kBF16:
      return 16;
    case trt::DataType::kINT4:
    case trt::DataType::kFP4:
      return 4;
    default:
      return 8;
  }
}

std::string shown(const trt::Dims& dims) {
  std::string text;
  for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
    text += (axis ? " x " : "") + std::to_string(dims.d[axis]);
  }
  return text.empty() ? "scalar" : text;
}

std::vector<char> read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path.string() + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

float median(std::vector<float> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Puts one execution into a graph and replays it; milliseconds of the middle replay.
float timed(trt::IExecutionContext& context, cudaStream_t stream, int repeats) {
  if (!context.enqueueV3(stream)) throw std::runtime_error("enqueueV3 failed");
  check(cudaStreamSynchronize(stream), "first run");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  const bool queued = context.enqueueV3(stream);
  check(cudaStreamEndCapture(stream, &graph), "capture");
  if (!queued) throw std::runtime_error("enqueueV3 failed while it was captured");
  check(cudaGraphInstantiate(&replay, graph, 0), "cudaGraphInstantiate");
  cudaEvent_t begin = nullptr, end = nullptr;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> found;
  for (int turn = 0; turn < repeats; ++turn) {
    check(cudaEventRecord(begin, stream), "cudaEventRecord");
    check(cudaGraphLaunch(replay, stream), "cudaGraphLaunch");
    check(cudaEventRecord(end, stream), "cudaEventRecord");
    check(cudaEventSynchronize(end), "cudaEventSynchronize");
    float elapsed = 0;
    check(cudaEventElapsedTime(&elapsed, begin, end), "cudaEventElapsedTime");
    found.push_back(elapsed);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  return median(found);
}

void run(trt::IRuntime& runtime, const std::filesystem::path& path, cudaStream_t stream,
         int repeats) {
  const std::vector<char> plan = read(path);
  std::unique_ptr<trt::ICudaEngine> engine(runtime.deserializeCudaEngine(plan.data(), plan.size()));
  if (!engine) throw std::runtime_error(path.string() + ": not a plan of this TensorRT and GPU");
  std::unique_ptr<trt::IExecutionContext> context(engine->createExecutionContext());
  if (!context || !context->setOptimizationProfileAsync(0, stream)) {
    throw std::runtime_error(path.string() + ": no execution context");
  }
  std::printf("%s\n", path.stem().string().c_str());
  for (int32_t number = 0; number < engine->getNbIOTensors(); ++number) {
    const char* name = engine->getIOTensorName(number);
    if (engine->getTensorIOMode(name) == trt::TensorIOMode::kINPUT) {
      const auto shape = engine->getProfileShape(name, 0, trt::OptProfileSelector::kOPT);
      if (!context->setInputShape(name, shape)) throw std::runtime_error("setInputShape failed");
    }
  }
  std::vector<std::unique_ptr<Buffer>> buffers;
  for (int32_t number = 0; number < engine->getNbIOTensors(); ++number) {
    const char* name = engine->getIOTensorName(number);
    const trt::Dims shape = context->getTensorShape(name);
    int64_t count = 1;
    for (int32_t axis = 0; axis < shape.nbDims; ++axis) count *= shape.d[axis];
    const size_t bytes = static_cast<size_t>((count * bits(engine->getTensorDataType(name)) + 7) / 8);
    const bool input = engine->getTensorIOMode(name) == trt::TensorIOMode::kINPUT;
    const char* aliased = input ? nullptr : engine->getAliasedInputTensor(name);
    if (aliased == nullptr) {
      buffers.push_back(std::make_unique<Buffer>(bytes));
      check(cudaMemsetAsync(buffers.back()->data, 0, bytes, stream), "cudaMemsetAsync");
      if (!context->setTensorAddress(name, buffers.back()->data)) {
        throw std::runtime_error("setTensorAddress failed");
      }
    } else {  // a cache that is updated in place
      void* same = const_cast<void*>(context->getTensorAddress(aliased));
      if (!context->setTensorAddress(name, same)) throw std::runtime_error("setTensorAddress failed");
    }
    std::printf("  %s %s: %s\n", input ? "in " : "out", name, shown(shape).c_str());
  }
  std::printf("  %.3f ms, %.1f MB of activations\n", timed(*context, stream, repeats),
              static_cast<double>(engine->getDeviceMemorySizeV2()) / 1048576.0);
}

int main_or_throw(int count, char** arguments) {
  std::set<std::string> wanted;
  std::filesystem::path bundle;
  int repeats = 20;
  for (int number = 1; number < count; ++number) {
    if (std::strcmp(arguments[number], "--repeats") == 0 && number + 1 < count) {
      repeats = std::max(1, std::atoi(arguments[++number]));
    } else if (bundle.empty()) {
      bundle = arguments[number];
    } else {
      wanted.insert(arguments[number]);
    }
  }
  if (!std::filesystem::is_directory(bundle)) {
    std::fprintf(stderr, "usage: focus_runner BUNDLE [PART ...] [--repeats N]\n");
    return 2;
  }
  Log log;
  std::unique_ptr<trt::IRuntime> runtime(trt::createInferRuntime(log));
  if (!runtime) throw std::runtime_error("TensorRT could not be started");
  runtime->setEngineHostCodeAllowed(false);  // a plan must not bring code for the host
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  int found = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(bundle)) {
    const auto& path = entry.path();
    const bool asked = wanted.empty() || wanted.count(path.stem().string()) != 0;
    if (entry.is_regular_file() && path.extension() == ".plan" && asked) {
      run(*runtime, path, stream, repeats);
      ++found;
    }
  }
  cudaStreamDestroy(stream);
  if (found == 0) {
    std::fprintf(stderr, "%s: no plan found; export with --backends tensorrt on this GPU\n",
                 bundle.string().c_str());
    return 2;
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    return main_or_throw(count, arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "focus_runner: %s\n", error.what());
    return 1;
  }
}
