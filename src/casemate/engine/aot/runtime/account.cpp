// The run's own account: Renyi differential privacy of Gaussian noise on Poisson samples at integer
// orders (Mironov, Talwar, Zhang 2019, arXiv:1908.10530, section 3.3), to (epsilon, delta) by
// Canonne, Kamath, Steinke 2020, arXiv:2004.00010, proposition 12. An upper bound: orders between
// are left out, and the sums' rounding is added. Twin: casemate/accounting/rdp.py.

namespace {

constexpr int TOP = 512;

class Account {
   public:
    Account(double rate, double noise, double delta) : delta(delta) {
        for (int a = 2; a <= TOP; a++) curve[a] = order(rate, noise, a);
    }
    double epsilon(double steps) const {
        double best = INFINITY;
        for (int a = 2; a <= TOP; a++)
            best = std::min(best, steps * curve[a] + std::log1p(-1.0 / a) -
                                      std::log(delta * a) / (a - 1));
        return std::max(0.0, best + 1e-12 * (1 + std::fabs(best)));
    }

   private:
    static double order(double q, double s, int a) {
        if (q >= 1) return a / (2 * s * s) * (1 + 1e-12);
        double top = -INFINITY;
        std::vector<double> terms(a + 1);
        double choose = 0;   // log of a over k
        for (int k = 0; k <= a; k++) {
            terms[k] = choose + k * std::log(q) + (a - k) * std::log1p(-q) +
                       double(k) * (k - 1) / (2 * s * s);
            top = std::max(top, terms[k]);
            choose += std::log(double(a - k)) - std::log(double(k + 1));
        }
        double sum = 0, size = 0;
        for (int k = 0; k <= a; k++) {
            sum += std::exp(terms[k] - top);
            size = std::max(size, std::fabs(terms[k]));
        }
        // A logarithm is off by some units in the last place of the largest that went into it.
        return (top + std::log(sum) + (size + a * 10.0) * 0x1p-46) / (a - 1);
    }
    double delta, curve[TOP + 1];
};

}  // namespace
