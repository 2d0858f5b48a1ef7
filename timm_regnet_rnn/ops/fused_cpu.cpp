// One regulator step, and a batch norm with ReLU, forward and backward, and the fuse convolution behind a step, forward,
// for float32 tensors in channels_last layout.
//
// A task is one image times one block of L channels. It copies x and h into zero-padded scratch that stays in cache,
// so that no tap needs a border check, and keeps the gates of a chunk of pixels in the nearest cache: x, h and c are read
// once, h' and c' written once. Correlations, exponentials and what is made of them are loops of their own, because a
// pixel's chain of them is longer than what a core can look ahead. The backward pass computes the gates again instead of
// reading them. Gate order, shapes and equations are those
// of reference.py, the specification; compile_cpu.py says how it is compiled. Nothing here allocates memory, so nothing
// throws: the room to work in comes from the caller. Functions return UNUSUAL, and what they wrote is worth nothing,
// where a value is not finite or beyond LIMIT: sums and saturated gates would not be those of the reference.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

namespace {

constexpr int USUAL = 0, UNUSUAL = 1;
constexpr float LIMIT = 1e8f;

constexpr int TAPS = 9;   // 3x3
enum Half { FROM_X, FROM_H };  // what a gate's taps read: [gate][half][tap] throughout
constexpr int CHUNK = 32;  // pixels whose gates are computed before anything is made of them
// A vector is one register, and the SUMS of GATES gates and several pixels, which share a weight, fit the registers. It
// takes eight to keep two FMA ports of four cycles busy.
#ifdef __AVX512F__
constexpr int L = 16;  // channels per block
constexpr int GATES = 4, SUMS = 16;
#else
constexpr int L = 8, GATES = 2, SUMS = 8;
#endif
constexpr int PAIR = GATES / 2;  // gates whose nine taps' gradients are summed together
typedef float V __attribute__((vector_size(L * 4), aligned(4)));
typedef int32_t I __attribute__((vector_size(L * 4), aligned(4)));

inline V load(const float* p) { return *reinterpret_cast<const V*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<V*>(p) = v; }
inline V splat(float f) { return V{} + f; }
inline V relu(V v) { return v < 0.0f ? V{} : v; }  // lets NaN through, as torch's

// Keeps the largest magnitude seen, as the bits of a float without its sign, which order as the floats do; NaN is beyond
// infinity.
struct Watch {
    I seen{};
    void see(V v) {
        I bits;
        std::memcpy(&bits, &v, sizeof bits);
        bits &= 0x7fffffff;
        seen = bits > seen ? bits : seen;
    }
    bool unusual() const {
        int32_t limit, most = 0;
        std::memcpy(&limit, &LIMIT, sizeof limit);
        for (int lane = 0; lane < L; lane++) most = std::max<int32_t>(most, seen[lane]);
        return most >= limit;
    }
};

// Both second operands are what min and max return for NaN.
#if defined(__AVX512F__)
inline V clamp40(V v) {
    return (V)_mm512_min_ps(_mm512_set1_ps(40.0f), _mm512_max_ps(_mm512_set1_ps(-40.0f), (__m512)v));
}
inline V inverse(V v) {  // 14 bits and a Newton step: a division blocks one of the two FMA ports for 16 cycles
    V y = (V)_mm512_rcp14_ps((__m512)v);
    return y * (2.0f - v * y);
}
#else
inline V inverse(V v) { return 1.0f / v; }
#ifdef __AVX2__
inline V clamp40(V v) {
    return (V)_mm256_min_ps(_mm256_set1_ps(40.0f), _mm256_max_ps(_mm256_set1_ps(-40.0f), (__m256)v));
}
#else
inline V clamp40(V v) {
    v = v < -40.0f ? splat(-40.0f) : v;
    return v > 40.0f ? splat(40.0f) : v;
}
#endif
#endif

// 1 + exp(-x): 2^n times a polynomial of degree 5 for 2^r on [-1/2, 1/2], relative error about 2e-7, its terms paired
// (Estrin), which shortens the chain that a tile waits for. Beyond +-40 a gate is saturated to the last bit, and the
// product of two exponentials still fits a float.
inline V one_plus_exp_minus(V x) {
    const float log2e = -1.44269504f;
    const V shift = splat(12582912.0f + 127.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
    x = clamp40(x);
    V biased = x * log2e + shift;
    V r = x * log2e - (biased - shift);
    V r2 = r * r;
    V p = (r * 1.3276472145e-03f + 9.6755416624e-03f) * r2 + (r * 5.5507132759e-02f + 2.4022119718e-01f);
    p = p * r2 + (r * 6.9314696706e-01f + 1.0000000717e+00f);
    I bits;
    std::memcpy(&bits, &biased, sizeof bits);
    bits <<= 23;  // n + 127 becomes the exponent, the rest of `biased` leaves on the left
    V scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale + 1.0f;
}
struct Shape {
    int64_t batch, channels, height, width;
    int64_t blocks() const { return channels / L; }
    int64_t row() const { return (width + 2) * L; }  // floats per padded row
    int64_t padded() const { return (height + 2) * row(); }
    int64_t at(int64_t y, int64_t x) const { return (y + 1) * row() + (x + 1) * L; }
    // What tap t of a pixel reads; TAPS - 1 - t is the pixel whose tap t reads this one.
    const float* tap(const float* pixel, int t) const { return pixel + (t / 3 - 1) * row() + (t % 3 - 1) * L; }
    int64_t pixel(int64_t b, int64_t n, int64_t y, int64_t x) const {
        return ((b * height + y) * width + x) * channels + n * L;
    }
};

// Weights (G, N, 2, 3, 3) of one channel block as [gate][x or h][tap][lane], and biases as [gate][lane].
template <int G>
struct alignas(L * sizeof(float)) Weights {
    float w[G][2][TAPS][L], b[G][L];
    void gather(const float* weight, const float* bias, int64_t channels, int64_t block, Watch& watch) {
        for (int g = 0; g < G; g++)
            for (int lane = 0; lane < L; lane++) {
                int64_t n = g * channels + block * L + lane;
                for (int s = 0; s < 2; s++)
                    for (int t = 0; t < TAPS; t++) w[g][s][t][lane] = weight[(n * 2 + s) * TAPS + t];
                b[g][lane] = bias[n];
            }
        for (int g = 0; g < G; g++) {
            watch.see(load(b[g]));
            for (int t = 0; t < 2 * TAPS; t++) watch.see(load(w[g][0][0] + t * L));
        }
    }
    void add_to(float* weight, float* bias, int64_t channels, int64_t block) const {
        for (int g = 0; g < G; g++)
            for (int lane = 0; lane < L; lane++) {
                int64_t n = g * channels + block * L + lane;
                for (int s = 0; s < 2; s++)
                    for (int t = 0; t < TAPS; t++) weight[(n * 2 + s) * TAPS + t] += w[g][s][t][lane];
                bias[n] += b[g][lane];
            }
    }
};

// acc[g][p] += 3x3 correlation of padded `src` with w[g] around pixel p of a tile.
template <int G, int P>
inline void correlate(const Shape& s, const float* src, const float (*w)[2][TAPS][L], int half, V (&acc)[G][P]) {
#pragma GCC unroll 16
    for (int t = 0; t < TAPS; t++) {
        const float* at = s.tap(src, t);
        V in[P];
#pragma GCC unroll 16
        for (int p = 0; p < P; p++) in[p] = load(at + p * L);
#pragma GCC unroll 16
        for (int g = 0; g < G; g++) {
            V k = load(w[g][half][t]);
#pragma GCC unroll 16
            for (int p = 0; p < P; p++) acc[g][p] += k * in[p];
        }
    }
}

// acc[i][p] += the transposed correlation of the padded gate gradients with w[.][half + i] around pixel p of a tile;
// with x and h as the two HALVES a gradient is loaded once for both.
template <int G, int HALVES, int P>
inline void correlate_transposed(
    const Shape& s, const float* grads, const float (*w)[2][TAPS][L], int half, V (*acc)[P]) {
    for (int g = 0; g < G; g++)
#pragma GCC unroll 16
        for (int t = 0; t < TAPS; t++) {
            const float* at = s.tap(grads + g * s.padded(), TAPS - 1 - t);
            V in[P];
#pragma GCC unroll 16
            for (int p = 0; p < P; p++) in[p] = load(at + p * L);
#pragma GCC unroll 16
            for (int i = 0; i < HALVES; i++) {
                V k = load(w[g][half + i][t]);
#pragma GCC unroll 16
                for (int p = 0; p < P; p++) acc[i][p] += k * in[p];
            }
        }
}

// Calls body(P, x) for tiles of P pixels of a row, as many as fit and then half as many, until they cover it; P is a
// compile-time constant.
template <int P, class Body>
inline void tiles(int64_t x, int64_t end, Body body) {
    for (; x + P <= end; x += P) body(std::integral_constant<int, P>{}, x);
    if constexpr (P > 1) tiles<P / 2>(x, end, body);
}

// Pixels of a map that are computed together: whole rows, or part of one.
struct Chunk {
    const Shape& s;
    int64_t y, x, rows, columns;
    int64_t pixels() const { return rows * columns; }
    // body(number, y, x) for every pixel.
    template <class Body>
    void each(Body body) const {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < columns; i++) body(r * columns + i, y + r, x + i);
    }
    // e[g] = 1 + exp(-factor[g] * a) for the pre-activations a of G gates; h null is zero.
    template <int G>
    void gates(
        const float* xs, const float* hs, const float (*w)[2][TAPS][L], const float (*b)[L], const float* factor,
        V (*e)[CHUNK]) const {
        constexpr int N = std::min(G, GATES), MOST = std::min(8, SUMS / N);
        for (int g = 0; g < G; g += N) {
            for (int64_t r = 0; r < rows; r++)
                tiles<MOST>(0, columns, [&](auto P, int64_t i) {
                    const int64_t at = s.at(y + r, x + i);
                    V a[N][P];
                    for (int k = 0; k < N; k++)
                        for (int p = 0; p < P; p++) a[k][p] = load(b[g + k]);
                    correlate<N, P>(s, xs + at, w + g, FROM_X, a);
                    if (hs) correlate<N, P>(s, hs + at, w + g, FROM_H, a);
                    for (int k = 0; k < N; k++)
                        for (int p = 0; p < P; p++) e[g + k][r * columns + i + p] = a[k][p];
                });
            for (int k = g; k < g + N; k++) exponentials(e[k], factor[k]);
        }
    }
    // 1 + exp(-factor * a) for the a of every pixel, in its place.
    void exponentials(V* a, float factor) const {
        for (int64_t p = 0; p < pixels(); p++) a[p] = one_plus_exp_minus(a[p] * factor);
    }
};

template <class Body>
inline void chunks(const Shape& s, Body body) {
    const int64_t columns = std::min<int64_t>(s.width, CHUNK), rows = columns ? CHUNK / columns : 1;
    for (int64_t y = 0; y < s.height; y += rows)
        for (int64_t x = 0; x < s.width; x += columns)
            body(Chunk{s, y, x, std::min(rows, s.height - y), std::min(columns, s.width - x)});
}

// dw[g][half] += sum over pixels of grad_g[pixel] * src[pixel + tap], for as many gates at a time as fit the
// registers; db[g], if not null, += that of grad_g.
template <int G>
void weight_grad(
    const Shape& s, const float* src, const float* grads, int half, float (*dw)[2][TAPS][L], float (*db)[L]) {
    for (int first = 0; first < G; first += PAIR) {
        const float* of[PAIR];
        for (int i = 0; i < PAIR; i++) of[i] = grads + std::min(first + i, G - 1) * s.padded();
        V acc[PAIR][TAPS] = {}, sum[PAIR] = {};
        for (int64_t y = 0; y < s.height; y++)
            for (int64_t x = 0; x < s.width; x++) {
                const int64_t o = s.at(y, x);
                V d[PAIR];
#pragma GCC unroll 16
                for (int i = 0; i < PAIR; i++) d[i] = load(of[i] + o), sum[i] += d[i];
#pragma GCC unroll 16
                for (int t = 0; t < TAPS; t++) {
                    V v = load(s.tap(src + o, t));
#pragma GCC unroll 16
                    for (int i = 0; i < PAIR; i++) acc[i][t] += d[i] * v;
                }
            }
        for (int g = first; g < std::min(first + PAIR, G); g++) {
            for (int t = 0; t < TAPS; t++) store(dw[g][half][t], load(dw[g][half][t]) + acc[g - first][t]);
            if (db) store(db[g], load(db[g]) + sum[g - first]);
        }
    }
}

// Batch norm of a (rows, channels) matrix by its own statistics, then ReLU, in tiles of rows that fit the cache. A step
// gives the sums of its h' itself, and takes the gradient of h' from here as it reads it. But for `clear`, functions are
// called by all threads.
struct Norm {
    int64_t rows, channels;
    double eps;
    const float *weight, *bias;
    float *mean, *var;
    double* room;  // two sums per channel: all of them, and those of each thread
    float *dweight = nullptr, *dbias = nullptr;
    static constexpr int64_t TILE_ROWS = 128;
    typedef double D __attribute__((vector_size(L * 8), aligned(8)));

    // One block of channels: ReLU(x * scale + shift), and 1 / standard deviation.
    struct Affine {
        V mean, inverse, scale, shift;
        V apply(V x) const { return relu(x * scale + shift); }
        V passed(V x, V dy) const { return x * scale + shift > 0.0f ? dy : V{}; }
    };
    Affine affine(int64_t n) const {
        Affine a;
        a.mean = load(mean + n);
        for (int lane = 0; lane < L; lane++) a.inverse[lane] = 1 / std::sqrt(var[n + lane] + eps);
        a.scale = a.inverse * load(weight + n);
        a.shift = load(bias + n) - a.mean * a.scale;
        return a;
    }
    // The same block's gradient of x, once `gradients` has those of weight and bias.
    struct Gradient {
        Affine a;
        V slope, constant;
        V of(V x, V dy) const { return a.passed(x, dy) * a.scale + (x * slope + constant); }
    };
    Gradient gradient(int64_t n) const {
        const Affine a = affine(n);
        const V slope = a.scale * a.inverse * load(dweight + n) * (-1.0f / rows);
        return Gradient{a, slope, a.scale * load(dbias + n) * (-1.0f / rows) - slope * a.mean};
    }

    // body(first element, end, first channel) for every tile and block of channels, shared out to the threads.
    template <class Body>
    void tiles(Body body) const {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r += TILE_ROWS)
            for (int64_t n = 0; n < channels; n += L)
                body(r * channels + n, std::min(rows, r + TILE_ROWS) * channels, n);
    }

    void clear() const { std::memset(room, 0, 2 * channels * sizeof(double)); }
    // A thread's own sums: of one value per channel, and of another.
    double* begin() const {
        double* part = room + (omp_get_thread_num() + 1) * 2 * channels;
        std::memset(part, 0, 2 * channels * sizeof(double));
        return part;
    }
    void add(double* part, int64_t n, D one, D two) const {
        *reinterpret_cast<D*>(&part[n]) += one;
        *reinterpret_cast<D*>(&part[channels + n]) += two;
    }
    // The sum of `count` values at(i), and of their squares as those around their mean and the mean's own, which needs a
    // double.
    template <class At>
    void add_moments(double* part, int64_t n, int64_t count, At at) const {
        V sum{}, squares{};
        for (int64_t i = 0; i < count; i++) sum += at(i);
        const V m = sum / static_cast<float>(count);
        for (int64_t i = 0; i < count; i++) squares += (at(i) - m) * (at(i) - m);
        const D one = __builtin_convertvector(sum, D);
        add(part, n, one, __builtin_convertvector(squares, D) + one * one / static_cast<double>(count));
    }
    // In the order of the threads, as in a step's `backward`.
    void collect(const double* part) const {
#pragma omp for ordered schedule(static, 1)
        for (int turn = 0; turn < omp_get_num_threads(); turn++) {
#pragma omp ordered
            for (int64_t i = 0; i < 2 * channels; i++) room[i] += part[i];
        }
    }

    // Collects the moments of x, and writes their mean and variance, and y.
    void apply(const double* part, const float* x, float* y) const {
        collect(part);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < channels; n++) {
            const double m = room[n] / rows;
            mean[n] = m;
            var[n] = std::max(room[channels + n] / rows - m * m, 0.0);
        }
        tiles([&](int64_t first, int64_t end, int64_t n) {
            const Affine a = affine(n);
            for (int64_t i = first; i < end; i += channels) store(y + i, a.apply(load(x + i)));
        });
    }
    // Writes the gradients of weight and bias.
    void gradients(const float* x, const float* dy, Watch& watch) const {
        double* part = begin();
        tiles([&](int64_t first, int64_t end, int64_t n) {
            const Affine a = affine(n);
            V s{}, product{};
            for (int64_t i = first; i < end; i += channels) {
                watch.see(load(x + i));
                watch.see(load(dy + i));
                const V d = a.passed(load(x + i), load(dy + i));
                s += d;
                product += d * (load(x + i) - a.mean);
            }
            add(part, n, __builtin_convertvector(s, D), __builtin_convertvector(product * a.inverse, D));
        });
        collect(part);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < channels; n++) dbias[n] = room[n], dweight[n] = room[channels + n];
    }

    int forward(const float* x, float* y, int threads) const {
        clear();
        bool unusual = false;
#pragma omp parallel num_threads(threads) reduction(|| : unusual)
        {
            Watch watch;
            double* part = begin();
            tiles([&](int64_t first, int64_t end, int64_t n) {
                Watch local;
                for (int64_t i = first; i < end; i += channels) local.see(load(x + i));
                watch.seen = local.seen > watch.seen ? local.seen : watch.seen;
                const int64_t count = (end - first + channels - 1) / channels;
                add_moments(part, n, count, [&](int64_t i) { return load(x + first + i * channels); });
            });
            apply(part, x, y);
            unusual = unusual || watch.unusual();
        }
        return unusual ? UNUSUAL : USUAL;
    }

    int backward(const float* x, const float* dy, float* dx, int threads) const {
        clear();
        bool unusual = false;
#pragma omp parallel num_threads(threads) reduction(|| : unusual)
        {
            Watch watch;
            gradients(x, dy, watch);
            tiles([&](int64_t first, int64_t end, int64_t n) {
                const Gradient g = gradient(n);
                for (int64_t i = first; i < end; i += channels) store(dx + i, g.of(load(x + i), load(dy + i)));
            });
            unusual = unusual || watch.unusual();
        }
        return unusual ? UNUSUAL : USUAL;
    }
};

// Tensors of a step; h, c, dh_out and dc_out may be null, which is zero, and dh and dc null, which is not wanted. With
// scale and shift the step ends in ReLU(h' * scale + shift), with a norm in ReLU(norm(h')), whose gradient dh_out is then;
// backward reads h' again.
struct Tensors {
    const float *x, *h, *c, *dh_out = nullptr, *dc_out = nullptr, *scale = nullptr, *shift = nullptr;
    float *h_out = nullptr, *c_out = nullptr, *dx = nullptr, *dh = nullptr, *dc = nullptr;
    const Norm* norm = nullptr;
    const float* more = nullptr;  // added to dx
};

// What may follow a step: y = ReLU(w [main, h] + b), a 1x1 convolution over the features and the state, pixel by pixel
// and STRIP channels at a time, with w as [strip][2 * channels][STRIP]; in training, where b is null, y = w [main, h]. 12
// sums, as in the step, and two registers of weights.
struct Fuse {
    const float *main, *weight, *bias;
    float* y;
    static constexpr int STRIP = 16, VECTORS = STRIP / L, PIXELS = 12 / VECTORS;
    static constexpr int64_t RANGE = 96;  // pixels whose features and state stay in the second cache for all strips
    // acc[p] += sum over k < count of in[p * across + k * along] * w[k * step]
    template <int P>
    static void multiply(
        int64_t count, const float* in, int64_t across, int64_t along, const float* w, int64_t step,
        V (&acc)[P][VECTORS]) {
        for (int64_t k = 0; k < count; k++, in += along, w += step)
#pragma GCC unroll 16
            for (int p = 0; p < P; p++) {
                const float factor = in[p * across];
#pragma GCC unroll 16
                for (int v = 0; v < VECTORS; v++) acc[p][v] += factor * load(w + v * L);
            }
    }
    void run(int64_t channels, const float* h, int64_t first, int64_t end) const {
        const float* w = weight;
        for (int64_t n = 0; n < channels; n += STRIP, w += 2 * channels * STRIP)
            tiles<PIXELS>(first, end, [&](auto P, int64_t pixel) {
                V acc[P][VECTORS] = {};
                for (int p = 0; bias && p < P; p++)
                    for (int v = 0; v < VECTORS; v++) acc[p][v] = load(bias + n + v * L);
                const int64_t at = pixel * channels;
                multiply<P>(channels, main + at, channels, 1, w, STRIP, acc);
                multiply<P>(channels, h + at, channels, 1, w + channels * STRIP, STRIP, acc);
                for (int p = 0; p < P; p++)
                    for (int v = 0; v < VECTORS; v++)
                        store(y + at + p * channels + n + v * L, bias ? relu(acc[p][v]) : acc[p][v]);
            });
    }

    // In training: y, and out = ReLU(norm(y)).
    int forward(const Norm& norm, const float* h, float* out, int threads) const {
        norm.clear();
        bool unusual = false;
#pragma omp parallel num_threads(threads) reduction(|| : unusual)
        {
            Watch watch;
            double* part = norm.begin();
#pragma omp for schedule(static)
            for (int64_t first = 0; first < norm.rows; first += RANGE) {
                const int64_t end = std::min(norm.rows, first + RANGE);
                run(norm.channels, h, first, end);
                for (int64_t n = 0; n < norm.channels; n += L) {
                    Watch local;
                    for (int64_t i = first; i < end; i++) local.see(load(y + i * norm.channels + n));
                    watch.seen = local.seen > watch.seen ? local.seen : watch.seen;
                    norm.add_moments(
                        part, n, end - first, [&](int64_t i) { return load(y + (first + i) * norm.channels + n); });
                }
            }
            norm.apply(part, y, out);
            unusual = unusual || watch.unusual();
        }
        return unusual ? UNUSUAL : USUAL;
    }
};

// The gradients of `Fuse::forward`, from y and the gradient of out: of the features, of the state, to which `more`, its
// gradient from elsewhere, is added if it is not null, of the norm, and of w. It is w and dw as [strip of the features
// and the state][channels][STRIP] here.
struct FuseGradients {
    const float *main, *h, *weight, *y, *dout, *more;
    float *dmain, *dh, *dweight;
    float* room;  // for each thread a dw of its own, and the gradients of a range's y
    static constexpr int STRIP = Fuse::STRIP, VECTORS = Fuse::VECTORS, OUTS = SUMS / VECTORS;
    static int64_t weights(int64_t channels) { return 2 * channels * channels; }
    static int64_t each(int64_t channels) { return weights(channels) + Fuse::RANGE * channels; }

    void range(const Norm& norm, int64_t first, int64_t end, float* dw, float* dy) const {
        const int64_t channels = norm.channels, count = end - first, start = first * channels;
        for (int64_t n = 0; n < channels; n += L) {
            const Norm::Gradient g = norm.gradient(n);
            for (int64_t i = n; i < count * channels; i += channels)
                store(dy + i, g.of(load(y + start + i), load(dout + start + i)));
        }
        for (int64_t k = 0; k < 2 * channels; k += STRIP) {
            const bool state = k >= channels;
            const int64_t at = start + k - (state ? channels : 0);
            const float *in = (state ? h : main) + at, *add = state && more ? more + at : nullptr;
            float *out = (state ? dh : dmain) + at, *sums = dw + k * channels;
            tiles<Fuse::PIXELS>(0, count, [&](auto P, int64_t p) {
                V acc[P][VECTORS] = {};
                for (int i = 0; add && i < P; i++)
                    for (int v = 0; v < VECTORS; v++) acc[i][v] = load(add + (p + i) * channels + v * L);
                Fuse::multiply<P>(channels, dy + p * channels, channels, 1, weight + k * channels, STRIP, acc);
                for (int i = 0; i < P; i++)
                    for (int v = 0; v < VECTORS; v++) store(out + (p + i) * channels + v * L, acc[i][v]);
            });
            tiles<OUTS>(0, channels, [&](auto P, int64_t n) {
                V acc[P][VECTORS] = {};
                Fuse::multiply<P>(count, dy + n, 1, channels, in, channels, acc);
                for (int i = 0; i < P; i++)
                    for (int v = 0; v < VECTORS; v++) {
                        float* sum = sums + (n + i) * STRIP + v * L;
                        store(sum, load(sum) + acc[i][v]);
                    }
            });
        }
    }
    int run(const Norm& norm, int threads) const {
        norm.clear();
        const int64_t size = weights(norm.channels);
        bool unusual = false;
#pragma omp parallel num_threads(threads) reduction(|| : unusual)
        {
            Watch watch;
            float* dw = room + omp_get_thread_num() * each(norm.channels);
            std::memset(dw, 0, size * sizeof(float));
            norm.gradients(y, dout, watch);
#pragma omp for schedule(static)
            for (int64_t first = 0; first < norm.rows; first += Fuse::RANGE)
                range(norm, first, std::min(norm.rows, first + Fuse::RANGE), dw, dw + size);
#pragma omp for ordered schedule(static, 1)
            for (int turn = 0; turn < omp_get_num_threads(); turn++) {
#pragma omp ordered
                for (int64_t i = 0; i < size; i++) dweight[i] += dw[i];
            }
            unusual = unusual || watch.unusual();
        }
        return unusual ? UNUSUAL : USUAL;
    }
};

// One image and one block of channels: where it lies in the tensors, its padded x and h, and room for padded maps.
struct Task {
    const Tensors& t;
    const Shape& s;
    int64_t b, n;
    const float *xs, *hs;
    float* room;
    Watch& watch;
    double* moments;  // of h', for a norm
    Norm::Gradient undo;  // of that norm, in backward
    V read(const float* p, int64_t y, int64_t x) const {
        if (!p) return V{};
        V v = load(p + s.pixel(b, n, y, x));
        watch.see(v);
        return v;
    }
    void write(float* p, int64_t y, int64_t x, V v) const { store(p + s.pixel(b, n, y, x), v); }
    // h' of a chunk's pixels.
    void write_h(const Chunk& chunk, const V* h) const {
        if (moments) t.norm->add_moments(moments, n * L, chunk.pixels(), [&](int64_t p) { return h[p]; });
        const bool affine = t.scale;
        const V scale = affine ? load(t.scale + n * L) : V{}, shift = affine ? load(t.shift + n * L) : V{};
        chunk.each([&](int64_t p, int64_t y, int64_t x) {
            write(t.h_out, y, x, affine ? relu(h[p] * scale + shift) : h[p]);
        });
    }
    // The gradients of h' of a chunk's pixels.
    void read_dh(const Chunk& chunk, V* dh) const {
        if (!t.norm) return chunk.each([&](int64_t p, int64_t y, int64_t x) { dh[p] = read(t.dh_out, y, x); });
        chunk.each([&](int64_t p, int64_t y, int64_t x) {
            const int64_t i = s.pixel(b, n, y, x);
            dh[p] = undo.of(load(t.h_out + i), load(t.dh_out + i));
        });
    }
    const float* state(int64_t y, int64_t x) const { return hs ? hs + s.at(y, x) : nullptr; }

    // dx from the padded gradients of all gates, dh from those of the first H plus `direct`.
    template <int G, int H>
    void input_grads(const Weights<G>& w, const float* grads, const float* direct) const {
        for (int64_t y = 0; y < s.height; y++)
            tiles<4>(0, s.width, [&](auto P, int64_t x) {
                const float* at = grads + s.at(y, x);
                V d[2][P] = {};
                for (int p = 0; t.more && p < P; p++) d[FROM_X][p] = load(t.more + s.pixel(b, n, y, x + p));
                if (t.dh) {
                    for (int p = 0; direct && p < P; p++) d[FROM_H][p] = load(direct + s.at(y, x + p));
                    correlate_transposed<H, 2, P>(s, at, w.w, FROM_X, d);
                    correlate_transposed<G - H, 1, P>(s, at + H * s.padded(), w.w + H, FROM_X, d);
                    for (int p = 0; p < P; p++) write(t.dh, y, x + p, d[FROM_H][p]);
                } else {
                    correlate_transposed<G, 1, P>(s, at, w.w, FROM_X, d);
                }
                for (int p = 0; p < P; p++) write(t.dx, y, x + p, d[FROM_X][p]);
            });
    }
};

// With e = 1 + exp(-a), 1 / e is the logistic function of a, and tanh(a / 2) = 2 / e - 1: cells compute with e, whose
// products save divisions.
inline V tanh_(V e) { return 2.0f * inverse(e) - 1.0f; }

struct RNN {
    static constexpr int G = 1, FORWARD = 0, BACKWARD = 1;  // gates, and padded maps of room
    static constexpr float FACTOR[G] = {2};
    static void forward(const Task& k, const Weights<G>& w) {
        chunks(k.s, [&](const Chunk& chunk) {
            V e[G][CHUNK];
            chunk.gates<G>(k.xs, k.hs, w.w, w.b, FACTOR, e);
            for (int64_t p = 0; p < chunk.pixels(); p++) e[0][p] = tanh_(e[0][p]);
            k.write_h(chunk, e[0]);
        });
    }
    static void backward(const Task& k, const Weights<G>& w, float (*dw)[2][TAPS][L], float (*db)[L]) {
        float* grads = k.room;
        chunks(k.s, [&](const Chunk& chunk) {
            V e[G][CHUNK], dh[CHUNK];
            chunk.gates<G>(k.xs, k.hs, w.w, w.b, FACTOR, e);
            k.read_dh(chunk, dh);
            chunk.each([&](int64_t p, int64_t y, int64_t x) {
                V h = tanh_(e[0][p]);
                store(grads + k.s.at(y, x), dh[p] * (1.0f - h * h));
            });
        });
        k.input_grads<G, G>(w, grads, nullptr);
        weight_grad<G>(k.s, k.xs, grads, FROM_X, dw, db);
        if (k.hs) weight_grad<G>(k.s, k.hs, grads, FROM_H, dw, nullptr);
    }
};

struct GRU {
    static constexpr int G = 3, FORWARD = 2, BACKWARD = 5;
    enum Gate { UPDATE, RESET, CANDIDATE };
    static constexpr float FACTOR[G] = {1, 1, 2};
    // z and r * h of the whole map, which the candidate's convolution reads around each pixel.
    static void reset(const Task& k, const Weights<G>& w, float* zs, float* rs, float* rh) {
        chunks(k.s, [&](const Chunk& chunk) {
            V e[2][CHUNK];
            chunk.gates<2>(k.xs, k.hs, w.w, w.b, FACTOR, e);
            chunk.each([&](int64_t p, int64_t y, int64_t x) {
                const int64_t o = k.s.at(y, x);
                V both = inverse(e[UPDATE][p] * e[RESET][p]), r = both * e[UPDATE][p];
                store(zs + o, both * e[RESET][p]);
                if (rs) store(rs + o, r);
                if (k.hs) store(rh + o, r * load(k.hs + o));
            });
        });
    }
    static void forward(const Task& k, const Weights<G>& w) {
        float *zs = k.room, *rh = k.room + k.s.padded();
        reset(k, w, zs, nullptr, rh);
        chunks(k.s, [&](const Chunk& chunk) {
            V e[1][CHUNK];
            chunk.gates<1>(k.xs, k.hs ? rh : nullptr, w.w + CANDIDATE, w.b + CANDIDATE, FACTOR + CANDIDATE, e);
            chunk.each([&](int64_t p, int64_t y, int64_t x) {
                V h = k.read(k.t.h, y, x);
                e[0][p] = h + load(zs + k.s.at(y, x)) * (tanh_(e[0][p]) - h);
            });
            k.write_h(chunk, e[0]);
        });
    }
    static void backward(const Task& k, const Weights<G>& w, float (*dw)[2][TAPS][L], float (*db)[L]) {
        const int64_t map = k.s.padded();
        float *grads = k.room, *rh = grads + G * map, *direct = rh + map;
        reset(k, w, grads + UPDATE * map, grads + RESET * map, rh);  // z and r lie where their gradients will
        chunks(k.s, [&](const Chunk& chunk) {
            V e[1][CHUNK], dhs[CHUNK];
            chunk.gates<1>(k.xs, k.hs ? rh : nullptr, w.w + CANDIDATE, w.b + CANDIDATE, FACTOR + CANDIDATE, e);
            k.read_dh(chunk, dhs);
            chunk.each([&](int64_t p, int64_t y, int64_t x) {
                const int64_t o = k.s.at(y, x);
                float* d = grads + o;
                V z = load(d + UPDATE * map), n = tanh_(e[0][p]), dh = dhs[p];
                store(d + UPDATE * map, dh * (n - k.read(k.t.h, y, x)) * z * (1.0f - z));
                store(d + CANDIDATE * map, dh * z * (1.0f - n * n));
                store(direct + o, dh * (1.0f - z));
            });
        });
        for (int64_t y = 0; y < k.s.height; y++)
            tiles<8>(0, k.s.width, [&](auto P, int64_t x) {
                const int64_t o = k.s.at(y, x);
                V drh[1][P] = {};
                if (k.hs) correlate_transposed<1, 1, P>(k.s, grads + CANDIDATE * map + o, w.w + CANDIDATE, FROM_H, drh);
                for (int p = 0; p < P; p++) {
                    float* d = grads + RESET * map + o + p * L;
                    V r = load(d);
                    store(d, drh[0][p] * k.read(k.t.h, y, x + p) * r * (1.0f - r));
                    float* past = direct + o + p * L;
                    store(past, load(past) + drh[0][p] * r);
                }
            });
        k.input_grads<G, 2>(w, grads, direct);
        weight_grad<G>(k.s, k.xs, grads, FROM_X, dw, db);
        if (k.hs) {
            weight_grad<2>(k.s, k.hs, grads, FROM_H, dw, nullptr);
            weight_grad<1>(k.s, rh, grads + CANDIDATE * map, FROM_H, dw + CANDIDATE, nullptr);
        }
    }
};

struct LSTM {
    static constexpr int G = 4, FORWARD = 0, BACKWARD = 4;
    enum Gate { INPUT, FORGET, OUTPUT, CANDIDATE };
    static constexpr float FACTOR[G] = {1, 1, 1, 2};
    static void forward(const Task& k, const Weights<G>& w) {
        chunks(k.s, [&](const Chunk& chunk) {
            V e[G][CHUNK], cs[CHUNK];
            chunk.gates<G>(k.xs, k.hs, w.w, w.b, FACTOR, e);
            chunk.each([&](int64_t p, int64_t y, int64_t x) {
                V i = e[INPUT][p], g = e[CANDIDATE][p];
                V c = k.read(k.t.c, y, x) * inverse(e[FORGET][p]) + (2.0f - g) * inverse(i * g);  // f * c + i * g
                k.write(k.t.c_out, y, x, c);
                cs[p] = c;
            });
            chunk.exponentials(cs, 2.0f);
            for (int64_t p = 0; p < chunk.pixels(); p++)
                cs[p] = (2.0f - cs[p]) * inverse(e[OUTPUT][p] * cs[p]);  // o * tanh(c)
            k.write_h(chunk, cs);
        });
    }
    static void backward(const Task& k, const Weights<G>& w, float (*dw)[2][TAPS][L], float (*db)[L]) {
        const int64_t map = k.s.padded();
        float* grads = k.room;
        chunks(k.s, [&](const Chunk& chunk) {
            V e[G][CHUNK], cs[CHUNK], dhs[CHUNK];
            chunk.gates<G>(k.xs, k.hs, w.w, w.b, FACTOR, e);
            k.read_dh(chunk, dhs);
            chunk.each([&](int64_t p, int64_t y, int64_t x) {
                V ig = inverse(e[INPUT][p] * e[CANDIDATE][p]), fo = inverse(e[FORGET][p] * e[OUTPUT][p]);
                V i = ig * e[CANDIDATE][p], f = fo * e[OUTPUT][p], g = 2.0f * ig * e[INPUT][p] - 1.0f;
                e[OUTPUT][p] = fo * e[FORGET][p];
                e[INPUT][p] = i, e[FORGET][p] = f, e[CANDIDATE][p] = g;
                cs[p] = f * k.read(k.t.c, y, x) + i * g;
            });
            chunk.exponentials(cs, 2.0f);
            chunk.each([&](int64_t p, int64_t y, int64_t x) {
                V i = e[INPUT][p], f = e[FORGET][p], o = e[OUTPUT][p], g = e[CANDIDATE][p], t = tanh_(cs[p]);
                V c = k.read(k.t.c, y, x), dh = dhs[p];
                V dc = k.read(k.t.dc_out, y, x) + dh * o * (1.0f - t * t);
                float* d = grads + k.s.at(y, x);
                store(d + INPUT * map, dc * g * i * (1.0f - i));
                store(d + FORGET * map, dc * c * f * (1.0f - f));
                store(d + OUTPUT * map, dh * t * o * (1.0f - o));
                store(d + CANDIDATE * map, dc * i * (1.0f - g * g));
                if (k.t.dc) k.write(k.t.dc, y, x, dc * f);
            });
        });
        k.input_grads<G, G>(w, grads, nullptr);
        weight_grad<G>(k.s, k.xs, grads, FROM_X, dw, db);
        if (k.hs) weight_grad<G>(k.s, k.hs, grads, FROM_H, dw, nullptr);
    }
};

// What the threads work in: the weights of every block of channels, then for each thread padded x, h and as many maps
// more as its cell asks for, and the sums of its weights' gradients. All of it begins at multiples of a vector, because
// a load that crosses cache lines costs two.
template <class Cell, bool BACKWARD>
struct Room {
    using W = Weights<Cell::G>;
    const Shape& s;
    float* start;
    static constexpr int64_t MAPS = 2 + (BACKWARD ? Cell::BACKWARD : Cell::FORWARD);
    int64_t weights() const { return s.blocks() * static_cast<int64_t>(sizeof(W) / sizeof(float)); }
    int64_t each() const { return MAPS * s.padded() + (BACKWARD ? weights() : 0); }
    int64_t size(int threads) const { return weights() + threads * each(); }
    W* blocks() const { return reinterpret_cast<W*>(start); }
    float* maps() const { return start + weights() + omp_get_thread_num() * each(); }
    W* sums() const { return reinterpret_cast<W*>(maps() + MAPS * s.padded()); }
    void gather(const float* weight, const float* bias, Watch& watch) const {
        for (int64_t n = 0; n < s.blocks(); n++) blocks()[n].gather(weight, bias, s.channels, n, watch);
    }
    // A border is never written to, so it stays zero from task to task.
    void clear() const { std::memset(maps(), 0, each() * sizeof(float)); }
    Task task(const Tensors& t, int64_t i, Watch& watch, double* moments = nullptr) const {
        const int64_t b = i / s.blocks(), n = i % s.blocks();
        float *xs = maps(), *hs = xs + s.padded();
        fill(t.x, b, n, xs, watch);
        if (t.h) fill(t.h, b, n, hs, watch);
        const Norm::Gradient undo = BACKWARD && t.norm ? t.norm->gradient(n * L) : Norm::Gradient{};
        return Task{t, s, b, n, xs, t.h ? hs : nullptr, hs + s.padded(), watch, moments, undo};
    }
    void fill(const float* src, int64_t b, int64_t n, float* dst, Watch& watch) const {
        Watch local;
        for (int64_t y = 0; y < s.height; y++)
            for (int64_t x = 0; x < s.width; x++) {
                const V v = load(src + s.pixel(b, n, y, x));
                local.see(v);
                store(dst + s.at(y, x), v);
            }
        watch.seen = local.seen > watch.seen ? local.seen : watch.seen;
    }
};

// A few images at a time where the fuse convolution follows, which then finds them in a cache.
template <class Cell>
int forward(
    const Shape& s, const Tensors& t, const Fuse& fuse, const float* weight, const float* bias, float* start,
    int threads, float* y = nullptr) {
    const int64_t area = s.height * s.width, group = fuse.y ? threads : s.batch;
    const Room<Cell, false> room{s, start};
    Watch all;
    room.gather(weight, bias, all);
    bool unusual = all.unusual();
    if (unusual) return UNUSUAL;
#pragma omp parallel num_threads(threads) reduction(|| : unusual)
    {
        Watch watch;
        double* moments = t.norm ? t.norm->begin() : nullptr;
        room.clear();
        for (int64_t b = 0; b < s.batch; b += group) {
            const int64_t until = std::min(s.batch, b + group);
#pragma omp for schedule(static)
            for (int64_t i = b * s.blocks(); i < until * s.blocks(); i++)
                Cell::forward(room.task(t, i, watch, moments), room.blocks()[i % s.blocks()]);
            if (!fuse.y) continue;
            const int64_t end = until * area, range = std::min(Fuse::RANGE, (end - b * area + threads - 1) / threads);
#pragma omp for schedule(static) nowait
            for (int64_t first = b * area; first < end; first += range)
                fuse.run(s.channels, t.h_out, first, std::min(end, first + range));
        }
        if (t.norm) t.norm->apply(moments, t.h_out, y);
        unusual = unusual || watch.unusual();
    }
    return unusual ? UNUSUAL : USUAL;
}

// dweight and dbias are added to; they come zeroed.
template <class Cell>
int backward(
    const Shape& s, const Tensors& t, const float* weight, const float* bias, float* dweight, float* dbias,
    float* start, int threads) {
    const int64_t tasks = s.batch * s.blocks();
    const Room<Cell, true> room{s, start};
    Watch all;
    room.gather(weight, bias, all);
    bool unusual = all.unusual();
    if (unusual) return UNUSUAL;
#pragma omp parallel num_threads(threads) reduction(|| : unusual)
    {
        Watch watch;
        room.clear();
        if (t.norm) t.norm->gradients(t.h_out, t.dh_out, watch);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tasks; i++) {
            auto& sums = room.sums()[i % s.blocks()];
            Cell::backward(room.task(t, i, watch), room.blocks()[i % s.blocks()], sums.w, sums.b);
        }
        // In the order of the threads, so that the same number of them gives the same sums.
#pragma omp for ordered schedule(static, 1)
        for (int turn = 0; turn < omp_get_num_threads(); turn++) {
#pragma omp ordered
            for (int64_t n = 0; n < s.blocks(); n++) room.sums()[n].add_to(dweight, dbias, s.channels, n);
        }
        unusual = unusual || watch.unusual();
    }
    return unusual ? UNUSUAL : USUAL;
}

}  // namespace

// name_room: floats that a call of name_forward or name_backward works in.
#define CELL(name, Cell)                                                                                             \
    extern "C" int64_t name##_room(                                                                                  \
        int threads, int64_t batch, int64_t channels, int64_t height, int64_t width, int backward) {                 \
        const Shape s{batch, channels, height, width};                                                               \
        return backward ? Room<Cell, true>{s, nullptr}.size(threads) : Room<Cell, false>{s, nullptr}.size(threads);  \
    }                                                                                                                \
    extern "C" int name##_forward(                                                                                   \
        int threads, int64_t batch, int64_t channels, int64_t height, int64_t width, const float* weight,            \
        const float* bias, const float* x, const float* h, const float* c, const float* scale, const float* shift,   \
        const float* main, const float* fuse_weight, const float* fuse_bias, float* y, float* h_out, float* c_out,   \
        float* room) {                                                                                               \
        const Shape s{batch, channels, height, width};                                                               \
        const Tensors t{x, h, c, nullptr, nullptr, scale, shift, h_out, c_out};                                      \
        const Fuse fuse{main, fuse_weight, fuse_bias, y};                                                            \
        return forward<Cell>(s, t, fuse, weight, bias, room, threads);                                               \
    }                                                                                                                \
    extern "C" int name##_backward(                                                                                  \
        int threads, int64_t batch, int64_t channels, int64_t height, int64_t width, const float* weight,            \
        const float* bias, const float* x, const float* h, const float* c, const float* dh_out, const float* dc_out, \
        float* dx, float* dh, float* dc, float* dweight, float* dbias, float* room) {                                \
        const Shape s{batch, channels, height, width};                                                               \
        const Tensors t{x, h, c, dh_out, dc_out, nullptr, nullptr, nullptr, nullptr, dx, dh, dc};                    \
        return backward<Cell>(s, t, weight, bias, dweight, dbias, room, threads);                                    \
    }                                                                                                                \
    extern "C" int name##_norm_forward(                                                                              \
        int threads, int64_t batch, int64_t channels, int64_t height, int64_t width, double eps,                     \
        const float* weight, const float* bias, const float* x, const float* h, const float* c,                      \
        const float* norm_weight, const float* norm_bias, float* y, float* h_out, float* c_out, float* mean,         \
        float* var, float* room, double* norm_room) {                                                                \
        const Shape s{batch, channels, height, width};                                                               \
        const Norm norm{batch * height * width, channels, eps, norm_weight, norm_bias, mean, var, norm_room};        \
        Tensors t{x, h, c, nullptr, nullptr, nullptr, nullptr, h_out, c_out};                                        \
        t.norm = &norm;                                                                                              \
        norm.clear();                                                                                                \
        return forward<Cell>(s, t, Fuse{}, weight, bias, room, threads, y);                                          \
    }                                                                                                                \
    extern "C" int name##_norm_backward(                                                                             \
        int threads, int64_t batch, int64_t channels, int64_t height, int64_t width, double eps,                     \
        const float* weight, const float* bias, const float* x, const float* h, const float* c,                      \
        const float* norm_weight, const float* norm_bias, float* h_out, float* mean, float* var, const float* dy,    \
        const float* dc_out, const float* more, float* dx, float* dh, float* dc, float* dweight, float* dbias,       \
        float* dnorm_weight, float* dnorm_bias, float* room, double* norm_room) {                                    \
        const Shape s{batch, channels, height, width};                                                               \
        const Norm norm{batch * height * width, channels, eps, norm_weight, norm_bias, mean, var, norm_room,         \
                        dnorm_weight, dnorm_bias};                                                                   \
        const Tensors t{x, h, c, dy, dc_out, nullptr, nullptr, h_out, nullptr, dx, dh, dc, &norm, more};             \
        norm.clear();                                                                                                \
        return backward<Cell>(s, t, weight, bias, dweight, dbias, room, threads);                                    \
    }

CELL(conv_rnn, RNN)
CELL(conv_gru, GRU)
CELL(conv_lstm, LSTM)

extern "C" int batch_norm_relu_forward(
    int threads, int64_t batch, int64_t channels, int64_t height, int64_t width, double eps, const float* weight,
    const float* bias, const float* x, float* y, float* mean, float* var, double* room) {
    return Norm{batch * height * width, channels, eps, weight, bias, mean, var, room}.forward(x, y, threads);
}
extern "C" int batch_norm_relu_backward(
    int threads, int64_t batch, int64_t channels, int64_t height, int64_t width, double eps, const float* weight,
    const float* bias, const float* x, float* mean, float* var, const float* dy, float* dx, float* dweight,
    float* dbias, double* room) {
    const Norm norm{batch * height * width, channels, eps, weight, bias, mean, var, room, dweight, dbias};
    return norm.backward(x, dy, dx, threads);
}

// fuse_norm_room: floats that fuse_norm_backward works in.
extern "C" int64_t fuse_norm_room(int threads, int64_t, int64_t channels, int64_t, int64_t) {
    return threads * FuseGradients::each(channels);
}
extern "C" int fuse_norm_forward(
    int threads, int64_t batch, int64_t channels, int64_t height, int64_t width, double eps, const float* main,
    const float* h, const float* fuse_weight, const float* weight, const float* bias, float* y, float* out, float* mean,
    float* var, double* room) {
    const Norm norm{batch * height * width, channels, eps, weight, bias, mean, var, room};
    return Fuse{main, fuse_weight, nullptr, y}.forward(norm, h, out, threads);
}
// dfuse_weight is added to; it comes zeroed.
extern "C" int fuse_norm_backward(
    int threads, int64_t batch, int64_t channels, int64_t height, int64_t width, double eps, const float* main,
    const float* h, const float* fuse_weight, const float* weight, const float* bias, const float* y, float* mean,
    float* var, const float* dout, const float* more, float* dmain, float* dh, float* dfuse_weight, float* dweight,
    float* dbias, float* room, double* norm_room) {
    const Norm norm{batch * height * width, channels, eps, weight, bias, mean, var, norm_room, dweight, dbias};
    const FuseGradients fuse{main, h, fuse_weight, y, dout, more, dmain, dh, dfuse_weight, room};
    return fuse.run(norm, threads);
}
