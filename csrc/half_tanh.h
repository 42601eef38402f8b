// tanh(x / 2) / x for x in [0, 1], which makes 2 sigmoid(x) = 1 + tanh(x / 2), as a polynomial in x^2, by
// interpolation at Chebyshev nodes. Its error is below 6e-17 in double, and x times it is right to 1.2e-8 in
// float. fdcr_fast/ops/triton/aggregation.py has the same numbers.
#pragma once

namespace fdcr {
namespace {  // every file has its own: nothing is shared between instruction sets

template <class M>
struct HalfTanh;
template <>
struct HalfTanh<float> {
  static constexpr float c[] = {0.5f, -0.041666336357593536f, 0.004163984674960375f, -0.00041393935680389404f,
                                3.345965888001956e-05f};
};
template <>
struct HalfTanh<double> {
  static constexpr double c[] = {0.49999999999999994591,     -0.041666666666655843735,
                                 0.0041666666663085941908,   -0.00042162697952141248899,
                                 0.000042713814630142639904, -4.3276377855561694044e-6,
                                 4.3822864428950056432e-7,   -4.4047370446504585783e-8,
                                 4.1616353172171888944e-9,   -2.7987532117168755421e-10};
};

}  // namespace
}  // namespace fdcr
