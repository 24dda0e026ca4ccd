// ONNX Runtime operators of FOCUS, on the native kernels:
//
//   session_options.register_custom_ops_library("libfocus_onnxruntime.so")
//
// Exported files run without this library, through the bodies that they carry; with it
// focus::focus_codebook_lookup is the native search. Only the C interface of ONNX Runtime is used, at
// the version below, so that the library serves every later runtime.

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "focus_kernels.h"

#if defined(_WIN32)
#define FOCUS_EXPORT extern "C" __declspec(dllexport)
#else
#define FOCUS_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

constexpr uint32_t kApiVersion = 12;  // the oldest whose OrtCustomOp has all that is set here

struct BookDelete {
  void operator()(focus_codebook* book) const { focus_codebook_free(book); }
};

// What a node keeps between runs: the codes as they were, and the same codes rearranged.
struct Lookup {
  const OrtApi* api;
  std::mutex mutex;
  std::vector<float> codes;
  std::shared_ptr<focus_codebook> book;

  std::shared_ptr<focus_codebook> prepared(const float* found, int64_t num, int64_t dim) {
    const size_t size = static_cast<size_t>(num * dim);
    std::lock_guard<std::mutex> lock(mutex);
    if (!book || codes.size() != size ||
        std::memcmp(codes.data(), found, size * sizeof(float)) != 0) {
      codes.assign(found, found + size);
      book.reset(focus_codebook_prepare(found, num, static_cast<int32_t>(dim)), BookDelete());
    }
    return book;
  }
};

// Collects the first error of a run; later calls of `ok` do nothing but fail.
struct Status {
  const OrtApi* api;
  std::string message;

  bool ok(OrtStatus* status) {
    if (status != nullptr) {
      if (message.empty()) message = api->GetErrorMessage(status);
      api->ReleaseStatus(status);
    }
    return message.empty();
  }
};

bool shape_of(Status& status, const OrtValue* value, std::vector<int64_t>& shape) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (!status.ok(status.api->GetTensorTypeAndShape(value, &info))) return false;
  size_t count = 0;
  bool good = status.ok(status.api->GetDimensionsCount(info, &count));
  shape.assign(good ? count : 0, 0);
  good = good && status.ok(status.api->GetDimensions(info, shape.data(), count));
  status.api->ReleaseTensorTypeAndShapeInfo(info);
  return good;
}

template <typename T>
T* data_of(Status& status, const OrtValue* value) {
  void* data = nullptr;
  status.ok(status.api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  return static_cast<T*>(data);
}

void compute(Lookup& lookup, OrtKernelContext* context, Status& status) {
  const OrtApi* api = lookup.api;
  const OrtValue *tokens = nullptr, *codes = nullptr;
  std::vector<int64_t> shape, table;
  if (!status.ok(api->KernelContext_GetInput(context, 0, &tokens)) ||
      !status.ok(api->KernelContext_GetInput(context, 1, &codes)) ||
      !shape_of(status, tokens, shape) || !shape_of(status, codes, table)) {
    return;
  }
  if (shape.empty() || table.size() != 2 || shape.back() != table[1]) {
    status.message = "focus_codebook_lookup: tokens [..., d] and codes [K, d] expected";
    return;
  }
  const int64_t dim = shape.back();
  shape.pop_back();
  int64_t num = 1;
  for (int64_t size : shape) num *= size;
  OrtValue *distance = nullptr, *index = nullptr;
  if (!status.ok(api->KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &distance)) ||
      !status.ok(api->KernelContext_GetOutput(context, 1, shape.data(), shape.size(), &index))) {
    return;
  }
  const float* x = data_of<float>(status, tokens);
  const float* c = data_of<float>(status, codes);
  float* nearest = data_of<float>(status, distance);
  int64_t* where = data_of<int64_t>(status, index);
  if (!status.message.empty() || num == 0) return;
  const auto book = lookup.prepared(c, table[0], dim);
  if (!book) {
    status.message = "focus_codebook_lookup: the codes could not be prepared";
    return;
  }
  const unsigned cores = std::thread::hardware_concurrency();
  const int threads = static_cast<int>(cores == 0 ? 1 : cores);
  const int code =
      focus_codebook_lookup(book.get(), x, num, where, nearest, threads, FOCUS_ISA_AUTO);
  if (code != FOCUS_OK) {
    status.message = "focus_codebook_lookup: the native kernel returned " + std::to_string(code);
  }
}

void* create(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo*) {
  auto* lookup = new Lookup();
  lookup->api = api;
  return lookup;
}

// The callback cannot fail in this version of the interface: outputs become (NaN, -1) instead.
void run(void* kernel, OrtKernelContext* context) {
  auto& lookup = *static_cast<Lookup*>(kernel);
  Status status{lookup.api, ""};
  compute(lookup, context, status);
  if (!status.message.empty()) std::fprintf(stderr, "%s\n", status.message.c_str());
}

ONNXTensorElementDataType input_type(const OrtCustomOp*, size_t) {
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

ONNXTensorElementDataType output_type(const OrtCustomOp*, size_t index) {
  return index == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
}

OrtCustomOp lookup_operator() {
  OrtCustomOp op{};
  op.version = kApiVersion;
  op.CreateKernel = create;
  op.GetName = [](const OrtCustomOp*) { return "focus_codebook_lookup"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputType = input_type;
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 2; };
  op.GetOutputType = output_type;
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 2; };
  op.KernelCompute = run;
  op.KernelDestroy = [](void* kernel) { delete static_cast<Lookup*>(kernel); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  return op;
}

}  // namespace

FOCUS_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                       const OrtApiBase* base) {
  static const OrtCustomOp op = lookup_operator();
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) return nullptr;  // an older runtime: the bodies in the file serve
  OrtCustomOpDomain* domain = nullptr;  // lives as long as the sessions do
  if (OrtStatus* status = api->CreateCustomOpDomain("focus", &domain)) return status;
  if (OrtStatus* status = api->CustomOpDomain_Add(domain, &op)) return status;
  return api->AddCustomOpDomain(options, domain);
}
