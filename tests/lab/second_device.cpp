// A second kind of device whose memory is the host's. Every kernel is the CPU's, but tensors of two
// kinds of device do not mix, and nothing may take the memory of one for that of the other: what a
// GPU would refuse is refused here too.

#include <cstring>

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

namespace {

using c10::SymIntArrayRef;
using std::optional;

constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::Device HERE(KIND, 0);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<KIND> {
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return HERE; }
  c10::Device exchangeDevice(c10::Device) const override { return HERE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, HERE); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Memory final : c10::Allocator {
  static void drop(void* memory) { c10::GetCPUAllocator()->raw_deallocate(memory); }
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = c10::GetCPUAllocator()->raw_allocate(bytes);
    return {memory, memory, &drop, HERE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &drop; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
};

const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

at::Tensor empty(SymIntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>,
                 optional<at::Device>, optional<bool>, optional<at::MemoryFormat> format) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  return at::detail::empty_generic(sizes, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, optional<at::ScalarType> dtype,
                         optional<at::Layout>, optional<at::Device>, optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size),
                                           C10_AS_INTARRAYREF_SLOW(stride), &memory, KEYS,
                                           c10::dtype_or_default(dtype));
}

// The same memory as a CPU tensor.
at::Tensor host(const at::Tensor& t) {
  if (!t.defined() || t.device().type() != KIND) return t;
  auto entries = static_cast<int64_t>(t.storage().nbytes() / t.element_size());
  auto line = at::from_blob(t.storage().mutable_data(), {entries}, t.options().device(at::kCPU));
  return line.as_strided(t.sizes(), t.strides(), t.storage_offset());
}

at::Tensor there(const at::Tensor& t) { return t.defined() ? t.to(HERE) : t; }

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  host(to).copy_(host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  at::native::resize_(to, from.sizes());
  return copy_from(from, to, false);
}

at::Scalar scalar(const at::Tensor& t) { return at::native::_local_scalar_dense_cpu(host(t)); }

at::Tensor as_strided(const at::Tensor& t, SymIntArrayRef size, SymIntArrayRef stride,
                      optional<c10::SymInt> offset) {
  optional<int64_t> start;
  if (offset) start = offset->expect_int();
  return at::native::as_strided_tensorimpl(t, C10_AS_INTARRAYREF_SLOW(size),
                                           C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor view(const at::Tensor& t, SymIntArrayRef size) {
  return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& t, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size),
                                    C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor unfold(const at::Tensor& t, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(t, dim, size, step);
}

const at::Tensor& resize_(const at::Tensor& t, SymIntArrayRef size,
                          optional<at::MemoryFormat> format) {
  return at::native::resize_(t, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor& set_storage(at::Tensor& t, at::Storage storage, c10::SymInt offset, SymIntArrayRef size,
                        SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(t, storage, offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor& set_tensor(at::Tensor& t, const at::Tensor& source) {
  return at::native::set_tensor_(t, source);
}

void require_same(const char* what, const at::Tensor& one, const at::Tensor& other) {
  TORCH_CHECK(one.device() == other.device(), "Expected all tensors to be on the same device in ",
              what, ", found ", one.device(), " and ", other.device());
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& w, const optional<at::Tensor>& b,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                       bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  require_same("convolution", x, w);
  optional<at::Tensor> bias;
  if (b && b->defined()) bias = host(*b);
  return there(at::convolution(host(x), host(w), bias, stride, padding, dilation, transposed,
                               output_padding, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& w, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  require_same("convolution_backward", x, w);
  require_same("convolution_backward", x, grad);
  std::vector<int64_t> bias = {transposed ? w.size(1) * groups : w.size(0)};
  auto [by_x, by_w, by_b] =
      at::convolution_backward(host(grad), host(x), host(w), at::OptionalIntArrayRef(bias), stride,
                               padding, dilation, transposed, output_padding, groups, mask);
  return {there(by_x), there(by_w), there(by_b)};
}

// Everything else: the CPU's kernel on copies, for operands of one device. A GPU takes a CPU tensor
// in two places only: as a number, and as an index.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  bool indexing = name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index_put", 0) == 0;
  at::Tensor seen;
  auto check = [&](const at::Tensor& t) {
    if (indexing || !t.defined() || (t.dim() == 0 && t.device().is_cpu())) return;
    if (seen.defined()) require_same(name.c_str(), seen, t);
    seen = t;
  };
  for (const auto& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (argument.isTensor()) check(argument.toTensor());
    if (argument.isTensorList())
      for (const at::Tensor& t : argument.toTensorList()) check(t);
  }
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", scalar);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("start", [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
}
