// The sums of a = R*M, b = x*M, c = R*(1-M) that every estimator needs: a, b, a^2, b^2, ab, c, c^2, |R|M, |R|(1-M).
#pragma once

namespace sib_ext {

constexpr int kMoments = 9;

}  // namespace sib_ext
