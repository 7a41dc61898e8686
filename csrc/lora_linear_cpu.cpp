// lora_linear on the CPU. The products are torch's own; what is saved are the passes over y and dx that scaling and
// adding the low-rank part would take, and the dropout mask.
#include <optional>
#include <tuple>

#include "dropout.h"
#include "lora_linear.h"
#include "products_cpu.h"

namespace sensilora {
namespace {

struct Cpu {
  static constexpr auto& addmm_into = sensilora::addmm_into;
  static constexpr auto& mm_into = sensilora::mm_into;
  static Tensor dropped(const Tensor& x, double p, const std::optional<Tensor>& seed) {
    return sensilora::dropped(x, p, key(x, p, seed));
  }
  static void add_dropped(const Tensor& into, const Tensor& x, double p, const std::optional<Tensor>& seed) {
    sensilora::add_dropped(into, x, p, key(x, p, seed));
  }

 private:
  static int64_t key(const Tensor& x, double p, const std::optional<Tensor>& seed) {
    const int64_t* pointer = seed_pointer(seed, p, x);
    return pointer == nullptr ? 0 : *pointer;
  }
};

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                       const Tensor& lora_A, const Tensor& lora_B, double scaling, double dropout_p,
                                       std::optional<Tensor> seed) {
  const NoGrad guard;
  return lora_linear_by_products<Cpu>(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed);
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& h,
                                                        const Tensor& weight, const Tensor& lora_A,
                                                        const Tensor& lora_B, double scaling, double dropout_p,
                                                        std::optional<Tensor> seed, bool need_grad_x) {
  const NoGrad guard;
  return lora_linear_backward_by_products<Cpu>(grad, x, h, weight, lora_A, lora_B, scaling, dropout_p, seed,
                                               need_grad_x);
}

}  // namespace
}  // namespace sensilora

STABLE_TORCH_LIBRARY_IMPL(sensilora_C, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&sensilora::lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&sensilora::lora_linear_backward));
}
