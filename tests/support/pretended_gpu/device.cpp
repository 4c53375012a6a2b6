// A pretended CUDA device for a CPU build of torch. Its memory is the host's, every operator runs on the CPU, and values
// are real: what trains on it can be compared with what trains on the CPU.
//
// It has devices, streams (which order nothing: operators run when they are called), memory and hooks. An operator that
// has no kernel for CUDA in this build, so nearly all, runs on CPU tensors over the same memory.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>

#include <malloc.h>

#include <atomic>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

constexpr auto kDevice = c10::DeviceType::CUDA;
constexpr int kMostDevices = 16;
int device_count = 1;
thread_local c10::DeviceIndex current_device = 0;
thread_local c10::StreamId current_streams[kMostDevices] = {0};

// ------------------------------------------------------------------------------------------------------ waits of the host

std::atomic<long> waits{0};
std::atomic<int> sync_debug_mode{0};  // 2: raise, as torch.cuda.set_sync_debug_mode("error") does

void host_waits(const char* what) {
  ++waits;
  TORCH_CHECK(sync_debug_mode < 2, "called a synchronizing CUDA operation (", what, ")");
}

// ------------------------------------------------------------------------------------------------ devices and streams

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device getDevice() const override { return {kDevice, current_device}; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < device_count, "CUDA error: invalid device ordinal");
    if (device.index() >= 0) current_device = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  c10::Stream getStream(c10::Device device) const noexcept override {
    const auto index = device.index() < 0 ? current_device : device.index();
    return c10::Stream(c10::Stream::UNSAFE, {kDevice, index}, current_streams[index]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    static std::atomic<c10::StreamId> latest{0};
    const auto index = device.index() < 0 ? current_device : device.index();
    return c10::Stream(c10::Stream::UNSAFE, {kDevice, index}, ++latest);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    const auto before = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(device_count); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
Guard guard;

// -------------------------------------------------------------------------------------------------------------- memory

std::mutex freed_mutex;
std::vector<void*> freed;  // since they were last asked for: their addresses may come again

std::atomic<long> allocated{0}, most_allocated{0};  // bytes
std::atomic<long> memory_limit{LONG_MAX};           // of all devices together

void give_back(void* data) {
  if (data) {
    allocated -= static_cast<long>(malloc_usable_size(data));
    const std::lock_guard<std::mutex> lock(freed_mutex);
    if (freed.size() < (1u << 20)) freed.push_back(data);
  }
  std::free(data);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes) {
      TORCH_CHECK_WITH(OutOfMemoryError, bytes < static_cast<size_t>(LONG_MAX) && allocated + static_cast<long>(bytes) <= memory_limit,
                       "CUDA out of memory. Tried to allocate ", bytes, " bytes. The pretended GPU has ", memory_limit.load(),
                       " bytes of which ", allocated.load(), " are allocated.");
      if (posix_memalign(&data, 512, bytes)) throw std::bad_alloc();
      const long now = allocated += static_cast<long>(malloc_usable_size(data));
      long most = most_allocated;
      while (now > most && !most_allocated.compare_exchange_weak(most, now)) {
      }
    }
    return {data, data, &give_back, guard.getDevice()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;

void release(void* storage) { delete static_cast<c10::Storage*>(storage); }

// A CPU tensor over the same memory, which it keeps.
at::Tensor on_host(const at::Tensor& t) {
  if (!t.defined() || t.device().type() != kDevice) return t;
  auto host = at::empty({0}, t.options().device(at::kCPU).requires_grad(false));
  auto* impl = host.unsafeGetTensorImpl();
  auto* owner = new c10::Storage(t.storage());
  // It can be made larger, as an operator does with an empty output; then it has left the device's memory.
  impl->set_storage_keep_dtype(c10::Storage(c10::Storage::use_byte_size_t(), owner->nbytes(),
      at::DataPtr(owner->mutable_data(), owner, &release, at::kCPU), c10::GetAllocator(at::kCPU), true));
  impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.is_conj()) host._set_conj(true);
  if (t.is_neg()) host._set_neg(true);
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return host;
}

at::Tensor over(const c10::Storage& storage, const at::Tensor& like) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), like.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return result;
}

at::Tensor empty(at::IntArrayRef size, c10::ScalarType dtype, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), dtype, format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, c10::ScalarType dtype) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), dtype);
}

at::Tensor on_device(const at::Tensor& host) {
  if (!host.defined() || host.device().type() == kDevice) return host;
  auto result = host.is_non_overlapping_and_dense() ? empty_strided(host.sizes(), host.strides(), host.scalar_type())
                                                    : empty(host.sizes(), host.scalar_type(), std::nullopt);
  on_host(result).copy_(host);
  return result;
}

// ----------------------------------------------------------------------------------------------------------- operators

// One call of an operator: which of its arguments are on the device, and their counterparts on the host.
struct Call {
  std::vector<at::Tensor> device, host;
  bool mixes = false, from_cpu = false;

  at::Tensor to_host(const at::Tensor& t) {
    if (!t.defined()) return t;
    if (t.device().type() != kDevice) {
      from_cpu |= t.device().is_cpu() && t.dim() > 0;
      return t;
    }
    TORCH_CHECK(device.empty() || device.front().device() == t.device(),
        "Expected all tensors to be on the same device, but found at least two devices, ", device.front().device(),
        " and ", t.device(), "!");
    device.push_back(t);
    host.push_back(on_host(t));
    return host.back();
  }

  // An output that the operator has made larger.
  void take_back_resized() {
    for (size_t i = 0; i < host.size(); ++i) {
      auto storage = device[i].storage();
      const auto& now = host[i].storage();
      if (now.data() != storage.data()) {
        auto data = memory.allocate(now.nbytes());
        if (now.nbytes()) std::memcpy(data.get(), now.data(), now.nbytes());
        storage.set_data_ptr_noswap(std::move(data));
        storage.set_nbytes(now.nbytes());
      }
      if (host[i].sizes() != device[i].sizes() || host[i].strides() != device[i].strides())
        device[i].unsafeGetTensorImpl()->set_sizes_and_strides(
            host[i].sizes(), host[i].strides(), host[i].storage_offset());
    }
  }

  at::Tensor to_device(const at::Tensor& result) {
    if (!result.defined() || result.device().type() == kDevice) return result;
    for (size_t i = 0; i < host.size(); ++i)
      if (host[i].unsafeGetTensorImpl() == result.unsafeGetTensorImpl()) return device[i];
    for (size_t i = 0; i < host.size(); ++i)  // a view
      if (result.storage().data() && result.storage().data() == device[i].storage().data())
        return over(device[i].storage(), result);
    return on_device(result);
  }
};

// Whether the host must know values before it knows the size of the result.
bool size_depends_on_values(const c10::OperatorHandle& op, const torch::jit::Stack& stack, size_t begin) {
  static const std::set<std::string> always{"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
      "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave", "aten::equal"};
  const auto& name = op.schema().name();
  if (always.count(name)) return true;
  if (name.rfind("aten::index", 0) != 0 && name.rfind("aten::_index_put", 0) != 0) return false;
  for (size_t i = begin; i < stack.size(); ++i)
    if (stack[i].isOptionalTensorList() || stack[i].isList())
      for (const auto& element : stack[i].toListRef())
        if (element.isTensor() && element.toTensor().defined() &&
            (element.toTensor().scalar_type() == at::kBool || element.toTensor().scalar_type() == at::kByte))
          return true;
  return false;
}

void run_on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto begin = stack->size() - schema.arguments().size();
  Call call;
  std::optional<c10::Device> asked;
  for (size_t i = begin; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.to_host(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const auto& t : value.toTensorVector()) list.push_back(call.to_host(t));
      value = c10::List<at::Tensor>(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& t : value.toOptionalTensorVector())
        list.push_back(t.has_value() ? std::optional<at::Tensor>(call.to_host(*t)) : std::nullopt);
      value = list;
    } else if (value.isDevice()) {
      asked = value.toDevice();
      value = c10::Device(at::kCPU);
    } else if (value.isGenerator()) {
      value = c10::IValue();
    }
  }
  if (!call.device.empty() && size_depends_on_values(op, *stack, begin)) host_waits(schema.name().c_str());
  // As CUDA's kernels: indices may be on the host, anything else of some dimensions not.
  const auto& name = schema.name();
  const bool indexes = name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index", 0) == 0 ||
      name.rfind("aten::_unsafe_index", 0) == 0;
  TORCH_CHECK(!call.from_cpu || call.device.empty() || indexes,
      "Expected all tensors to be on the same device, but found at least two devices, ", call.device.front().device(),
      " and cpu! (", name, ")");
  c10::OptionalDeviceGuard on(call.device.empty() ? asked : std::optional<c10::Device>(call.device.front().device()));
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.take_back_resized();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.to_device(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const auto& t : value.toTensorVector()) list.push_back(call.to_device(t));
      value = c10::List<at::Tensor>(list);
    }
  }
}

at::Tensor op_empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard on(device.value_or(guard.getDevice()));
  return empty(size, c10::dtype_or_default(dtype), format);
}

at::Tensor op_empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard on(device.value_or(guard.getDevice()));
  return empty_strided(size, stride, c10::dtype_or_default(dtype));
}

at::Tensor& op_copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (!non_blocking && self.device().type() != source.device().type()) host_waits("copy_");
  on_host(self).copy_(on_host(source));
  return self;
}

at::Scalar op_local_scalar_dense(const at::Tensor& self) {
  host_waits("item");
  return at::_local_scalar_dense(on_host(self));
}

at::Tensor op_as_strided(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride,
    std::optional<int64_t> offset) {
  auto result = over(self.storage(), self);
  result.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.value_or(self.storage_offset()));
  return result;
}

at::Tensor op_view(const at::Tensor& self, at::IntArrayRef size) { return over(self.storage(), on_host(self).view(size)); }

at::Tensor op_view_dtype(const at::Tensor& self, at::ScalarType dtype) {
  return over(self.storage(), on_host(self).view(dtype));
}

const at::Tensor& op_resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  Call call;
  call.to_host(self).resize_(size);
  c10::DeviceGuard on(self.device());
  call.take_back_resized();
  return self;
}

at::Tensor& op_set_strided(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
    at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  if (stride.empty() && !size.empty()) {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}

at::Tensor& op_set_storage(at::Tensor& self, at::Storage source) {
  const auto elements = static_cast<int64_t>(source.nbytes() / self.element_size());
  return op_set_strided(self, std::move(source), 0, {elements}, {});
}

at::Tensor& op_set_tensor(at::Tensor& self, const at::Tensor& source) {
  return op_set_strided(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& op_set(at::Tensor& self) {
  c10::DeviceGuard on(self.device());
  return op_set_strided(self, c10::Storage(c10::Storage::use_byte_size_t(), 0, memory.allocate(0), &memory, true), 0, {0}, {});
}

int64_t op_fused_sdp_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
    double, bool, std::optional<double>, bool) {
  return 0;  // plain matrix products
}

void op_record_stream(at::Tensor&, c10::Stream) {}
bool op_is_pinned(const at::Tensor&, std::optional<at::Device>) { return false; }

void resize_storage(at::Storage storage, int64_t bytes) {
  const auto size = static_cast<size_t>(bytes);
  if (size == storage.nbytes()) return;
  c10::DeviceGuard on(storage.device());
  auto data = memory.allocate(size);
  if (const auto kept = std::min(size, storage.nbytes())) std::memcpy(data.get(), storage.data(), kept);
  storage.set_data_ptr_noswap(std::move(data));
  storage.set_nbytes(size);
}

at::Tensor op_as_host(const at::Tensor& t) { return on_host(t); }

}  // namespace

TORCH_LIBRARY(pretended, m) {
  m.def("as_host(Tensor(a) t) -> Tensor(a)");
  m.def("resize_storage(Storage storage, int bytes) -> ()", resize_storage);
}
TORCH_LIBRARY_IMPL(pretended, CUDA, m) { m.impl("as_host", op_as_host); }
TORCH_LIBRARY_IMPL(pretended, CPU, m) { m.impl("as_host", op_as_host); }
TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", op_empty);
  m.impl("empty_strided", op_empty_strided);
  m.impl("copy_", op_copy_);
  m.impl("_local_scalar_dense", op_local_scalar_dense);
  m.impl("as_strided", op_as_strided);
  m.impl("view", op_view);
  m.impl("view.dtype", op_view_dtype);
  m.impl("resize_", op_resize_);
  m.impl("set_.source_Storage_storage_offset", op_set_strided);
  m.impl("set_.source_Storage", op_set_storage);
  m.impl("set_.source_Tensor", op_set_tensor);
  m.impl("set_", op_set);
  m.impl("_fused_sdp_choice", op_fused_sdp_choice);
  m.impl("record_stream", op_record_stream);
  m.impl("is_pinned", op_is_pinned);
  // These would choose among CUDA's own kernels.
  for (const auto* name : {"convolution", "convolution_backward", "native_batch_norm", "native_batch_norm_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

namespace at {
struct PretendedHooks final : CUDAHooksInterface {
  explicit PretendedHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return current_device_(); }
  DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(device_count); }
  DeviceIndex getCurrentDevice() const override { return current_device_(); }
  void setCurrentDevice(DeviceIndex device) const override { guard.setDevice({kDevice, device}); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return guard.exchangeDevice({kDevice, device}).index(); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  int getNumGPUs() const override { return device_count; }
  Device getDeviceFromPtr(void*) const override { return guard.getDevice(); }
  bool isPinnedPtr(const void*) const override { return false; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(kCPU); }

 private:
  DeviceIndex current_device_() const { return guard.getDevice().index(); }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, PretendedHooks)
}  // namespace at

namespace c10d {
class PretendedTimer final : public Timer {  // of DDP's statistics
 public:
  explicit PretendedTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event, Event) override { return 0; }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, PretendedTimer)
}  // namespace c10d

extern "C" {
void pretend(int devices) {
  device_count = devices;
  static const c10::impl::DeviceGuardImplRegistrar registered(kDevice, &guard);
  c10::SetAllocator(kDevice, &memory, 1);
}
int get_device() { return current_device; }
void set_device(int device) { current_device = static_cast<c10::DeviceIndex>(device); }
long get_stream(int device) { return static_cast<long>(current_streams[device]); }
void set_stream(int device, long stream) { current_streams[device] = stream; }
long host_waits_so_far() { return waits; }
void set_sync_debug_mode(int mode) { sync_debug_mode = mode; }
int get_sync_debug_mode() { return sync_debug_mode; }
long memory_allocated() { return allocated; }
void set_memory_limit(long bytes) { memory_limit = bytes; }
long max_memory_allocated() { return most_allocated; }
void reset_peak_memory_stats() { most_allocated = allocated.load(); }
// Addresses of device memory that was freed since the last call, at most `most` of them.
int take_freed(void** out, int most) {
  const std::lock_guard<std::mutex> lock(freed_mutex);
  int count = 0;
  while (count < most && !freed.empty()) {
    out[count++] = freed.back();
    freed.pop_back();
  }
  return count;
}
}
