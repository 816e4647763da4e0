/* A second implementation of BAFFLE's directions and messages, version 1, in C99 without a library.
 *
 * Written from the definitions in stream.py, perturbations.py, estimator.py and plan.py; no line of it
 * is shared with them. It is held against v1.json and against NumPy, bit for bit, by test_vectors.py,
 * and may serve as the start of a port.
 *
 *     cc -O2 -ffp-contract=off -std=c99 -Wall -Wextra -Werror reference.c -lm -o reference
 *     ./reference gaussian15.bin < commands > answers
 *
 * One command a line, words separated by blanks; one answer a line, "refused" where there is none.
 * Bytes are hexadecimal ("-" for none), words and float bits hexadecimal numbers, lists separated by
 * commas, other integers decimal. A layout is name=shape,... as in conv=3x2x2x2,bias=3,scalar=
 *
 *     table                                               SHA-256 of the half table
 *     sha256 BYTES
 *     philox C0,C1,C2,C3 K0,K1
 *     seed VALUE                                          VALUE: 32 hexadecimal digits
 *     derive SEED LABEL,LABEL,...                         labels as bytes
 *     words SEED ROUND K START STOP
 *     permutation SEED ROUND K COUNT
 *     values SPEC LAYOUT SEED ROUND K START STOP
 *     gradient SPEC LAYOUT SEED ROUND SLOPES              slopes: float64 bits
 *     digest LAYOUT FROZEN WEIGHTS                        weights: float32 bits
 *     plan BYTES                                          → its fields, and its bytes encoded again
 *     result PLAN SAMPLES VALUES                          → a client's answer to the plan's bytes
 */

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LINE (1 << 20)
#define TENSORS 64
#define NAME 1000 /* characters of a perturbation's */

typedef struct {
    uint8_t *data;
    size_t size;
} bytes;

/* ---- SHA-256 (FIPS 180-4) -------------------------------------------------------------------- */

static const uint32_t SHA_K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

typedef struct {
    uint32_t h[8];
    uint8_t block[64];
    uint64_t length;
} sha256;

static uint32_t rotr(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void sha_init(sha256 *s) {
    static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(s->h, start, sizeof start);
    s->length = 0;
}

static void sha_block(sha256 *s) {
    uint32_t w[64], v[8];
    for (int t = 0; t < 16; t++) {
        const uint8_t *p = s->block + 4 * t;
        w[t] = (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
    }
    for (int t = 16; t < 64; t++) {
        uint32_t a = w[t - 15], b = w[t - 2];
        w[t] = w[t - 16] + w[t - 7] + (rotr(a, 7) ^ rotr(a, 18) ^ a >> 3) +
               (rotr(b, 17) ^ rotr(b, 19) ^ b >> 10);
    }
    memcpy(v, s->h, sizeof v);
    for (int t = 0; t < 64; t++) {
        uint32_t a = v[0], e = v[4];
        uint32_t t1 = v[7] + (rotr(e, 6) ^ rotr(e, 11) ^ rotr(e, 25)) + ((e & v[5]) ^ (~e & v[6])) +
                      SHA_K[t] + w[t];
        uint32_t t2 = (rotr(a, 2) ^ rotr(a, 13) ^ rotr(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += t1;
        v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) s->h[i] += v[i];
}

static void sha_add(sha256 *s, const void *data, size_t size) {
    const uint8_t *p = data;
    while (size--) {
        s->block[s->length++ % 64] = *p++;
        if (s->length % 64 == 0) sha_block(s);
    }
}

static void sha_end(sha256 *s, uint8_t digest[32]) {
    uint64_t bits = 8 * s->length;
    uint8_t pad = 0x80, tail[8];
    sha_add(s, &pad, 1);
    for (pad = 0; s->length % 64 != 56;) sha_add(s, &pad, 1);
    for (int i = 0; i < 8; i++) tail[i] = (uint8_t)(bits >> (56 - 8 * i));
    sha_add(s, tail, 8);
    for (int i = 0; i < 32; i++) digest[i] = (uint8_t)(s->h[i / 4] >> (24 - 8 * (i % 4)));
}

/* ---- little-endian integers and float bits ---------------------------------------------------- */

static void put(uint8_t *at, uint64_t value, int size) {
    for (int i = 0; i < size; i++) at[i] = (uint8_t)(value >> 8 * i);
}

static uint64_t get(const uint8_t *at, int size) {
    uint64_t value = 0;
    for (int i = size; i--;) value = value << 8 | at[i];
    return value;
}

static void sha_add_int(sha256 *s, uint64_t value, int size) {
    uint8_t raw[8];
    put(raw, value, size);
    sha_add(s, raw, (size_t)size);
}

static uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static double double_from(uint64_t bits) {
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

/* ---- the stream -------------------------------------------------------------------------------- */

typedef struct {
    uint32_t h[8];
} stream;

static void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
    for (int i = 0; i < 10; i++) {
        uint64_t p0 = (uint64_t)0xD2511F53 * c[0], p1 = (uint64_t)0xCD9E8D57 * c[2];
        c[0] = (uint32_t)(p1 >> 32) ^ c[1] ^ k0;
        c[1] = (uint32_t)p1;
        c[2] = (uint32_t)(p0 >> 32) ^ c[3] ^ k1;
        c[3] = (uint32_t)p0;
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
}

static stream stream_of(const uint8_t seed[32], uint64_t round) {
    sha256 s;
    uint8_t digest[32];
    stream out;
    sha_init(&s);
    sha_add(&s, "baffle stream v1", 16);
    sha_add(&s, seed, 32);
    sha_add_int(&s, round, 8);
    sha_end(&s, digest);
    for (int i = 0; i < 8; i++) out.h[i] = (uint32_t)get(digest + 4 * i, 4);
    return out;
}

static uint32_t word(const stream *s, uint32_t k, uint64_t i) {
    uint32_t c[4] = {(uint32_t)(i / 4), k, s->h[2], s->h[3]};
    philox(c, s->h[0], s->h[1]);
    return c[i % 4];
}

/* ---- directions -------------------------------------------------------------------------------- */

static uint16_t table[32768];

static int64_t gaussian_integer(const stream *s, uint32_t k, uint64_t i) {
    uint32_t u = word(s, k, i / 2) >> 16 * (i % 2) & 0xFFFF;
    return u < 32768 ? table[u] : -(int64_t)table[u - 32768];
}

typedef struct {
    char kind; /* g, r, l; b for directions in one layer */
    uint32_t rank;
    int layers;
    uint64_t counts[NAME], directions; /* of each layer; of all */
} perturbation;

typedef struct {
    int tensors;
    char *names[TENSORS];
    int dims[TENSORS];
    uint64_t shapes[TENSORS][8];
} layout;

static uint64_t columns_of(const layout *l, int t) { /* of the matrix (o, m); 1 for a vector */
    uint64_t m = 1;
    for (int d = 1; d < l->dims[t]; d++) m *= l->shapes[t][d];
    return m;
}

static uint64_t size_of(const layout *l, int t) {
    return l->dims[t] ? l->shapes[t][0] * columns_of(l, t) : 1;
}

static size_t prefix_of(const char *name) { /* its length up to the last dot */
    const char *dot = strrchr(name, '.');
    return dot ? (size_t)(dot - name) : 0;
}

static int same_layer(const layout *l, int t, int u) {
    size_t size = prefix_of(l->names[t]);
    return size == prefix_of(l->names[u]) && !memcmp(l->names[t], l->names[u], size);
}

static float in_layer(const perturbation *p, const stream *s, uint32_t k, const layout *l, uint64_t i) {
    uint64_t start = 0, first = 0; /* of a layer: its parameters, its directions */
    int layer = 0;
    for (int t = 0, next; t < l->tensors; t = next) {
        uint64_t size = 0;
        for (next = t; next < l->tensors && same_layer(l, t, next); next++) size += size_of(l, next);
        if (!size) continue;
        if (layer == p->layers || p->counts[layer] > size) abort();
        uint64_t count = p->counts[layer++];
        if (i >= start && i < start + size) {
            if (k < first || k >= first + count) return 0.0f;
            if (count == size) return i - start == k - first ? (float)sqrt((double)p->directions) : 0.0f;
            double scale = sqrt((double)p->directions / (double)count);
            return (float)((double)gaussian_integer(s, k, i) / 4096.0 * scale);
        }
        start += size, first += count;
    }
    abort();
}

static float value(const perturbation *p, const stream *s, uint32_t k, const layout *l, uint64_t i) {
    if (p->kind == 'g') return (float)gaussian_integer(s, k, i) / 4096.0f;
    if (p->kind == 'r') return word(s, k, i / 32) >> (i % 32) & 1 ? -1.0f : 1.0f;
    if (p->kind == 'b') return in_layer(p, s, k, l, i);
    uint64_t position = 0, r = p->rank; /* of the tensor's factors in the stream */
    for (int t = 0; t < l->tensors; t++) {
        uint64_t size = size_of(l, t), m = columns_of(l, t);
        int matrix = l->dims[t] > 1;
        if (i < size && !matrix) return (float)gaussian_integer(s, k, position + i) / 4096.0f;
        if (i < size) {
            uint64_t rows = l->shapes[t][0];
            int64_t sum = 0;
            for (uint64_t j = 0; j < r; j++)
                sum += gaussian_integer(s, k, position + i / m * r + j) *
                       gaussian_integer(s, k, position + rows * r + i % m * r + j);
            return (float)((double)sum * (ldexp(1.0, -24) * (1.0 / sqrt((double)r))));
        }
        position += matrix ? (l->shapes[t][0] + m) * r : size;
        i -= size;
    }
    abort(); /* callers stay inside the layout */
}

/* ---- messages ---------------------------------------------------------------------------------- */

typedef struct {
    uint64_t round, sigma, rate, clip, decay; /* four float64, as bits */
    uint32_t directions, batch_size;
    uint8_t seed[32], digest[32];
    uint8_t scheme, fidelity, optimizer;
    uint16_t epochs; /* 0: batch-level, and no optimizer or clip */
    uint16_t steps;  /* batch-level: 0 for none, and no rate */
    char spec[NAME + 1];
} plan;

static int positive(uint64_t bits) { return isfinite(double_from(bits)) && double_from(bits) > 0; }

static int parse_spec(const char *spec, perturbation *p) {
    char back[16];
    memset(p, 0, sizeof *p);
    p->kind = spec[0];
    if (!strncmp(spec, "layers:", 7)) {
        const char *at = spec + 6;
        p->kind = 'b';
        do {
            if (*++at < '1' || *at > '9' || p->layers == NAME) return 0;
            uint64_t count = 0;
            for (; *at >= '0' && *at <= '9' && count < UINT32_MAX; at++) count = 10 * count + (uint64_t)(*at - '0');
            p->counts[p->layers++] = count;
            p->directions += count;
        } while (*at == '.');
        return !*at && p->directions <= UINT32_MAX;
    }
    if (!strcmp(spec, "gaussian") || !strcmp(spec, "rademacher")) return 1;
    p->rank = strncmp(spec, "lowrank:", 8) ? 0 : (uint32_t)strtoul(spec + 8, NULL, 10);
    snprintf(back, sizeof back, "lowrank:%" PRIu32, p->rank);
    return p->rank >= 1 && p->rank <= 65535 && !strcmp(spec, back); /* no sign, no leading zero */
}

static size_t encode_plan(const plan *p, uint8_t *out) {
    size_t length = strlen(p->spec);
    uint8_t *at = out;
    memcpy(at, "BFFL\1\1", 6), at += 6;
    put(at, p->round, 8), at += 8;
    memcpy(at, p->seed, 32), at += 32;
    put(at, p->directions, 4), at += 4;
    put(at, p->sigma, 8), at += 8;
    *at++ = p->scheme;
    put(at, length, 2), at += 2;
    memcpy(at, p->spec, length), at += length;
    *at++ = p->fidelity;
    put(at, p->batch_size, 4), at += 4;
    memcpy(at, p->digest, 32), at += 32;
    put(at, p->epochs, 2), at += 2;
    if (p->epochs) {
        put(at, p->rate, 8), at += 8;
        *at++ = p->optimizer;
        put(at, p->clip, 8), at += 8;
        if (p->decay) put(at, p->decay, 8), at += 8;
    } else if (p->steps) {
        put(at, p->steps, 2), at += 2;
        put(at, p->rate, 8), at += 8;
    }
    return (size_t)(at - out);
}

static int decode_plan(bytes b, plan *p) { /* 1: a plan; 0: refused */
    size_t length, size;
    const uint8_t *at = b.data + 6;
    perturbation kind;
    memset(p, 0, sizeof *p);
    if (b.size < 61 || memcmp(b.data, "BFFL\1\1", 6)) return 0;
    p->round = get(at, 8);
    memcpy(p->seed, at + 8, 32);
    p->directions = (uint32_t)get(at + 40, 4);
    p->sigma = get(at + 44, 8);
    p->scheme = at[52];
    length = (size_t)get(at + 53, 2);
    size = 61 + length + 39;
    if (length >= sizeof p->spec || b.size < size) return 0;
    memcpy(p->spec, at + 55, length);
    if (strlen(p->spec) != length || !parse_spec(p->spec, &kind)) return 0;
    at += 55 + length;
    p->fidelity = at[0];
    p->batch_size = (uint32_t)get(at + 1, 4);
    memcpy(p->digest, at + 5, 32);
    p->epochs = (uint16_t)get(at + 37, 2);
    if (!p->epochs && b.size == size + 10) {
        p->steps = (uint16_t)get(at + 39, 2);
        p->rate = get(at + 41, 8);
        if (p->steps < 2 || p->directions % p->steps || !positive(p->rate) || p->fidelity) return 0;
    } else if (b.size != size + (p->epochs ? 17 : 0) && !(p->epochs && b.size == size + 25)) {
        return 0;
    }
    if (p->epochs) {
        p->rate = get(at + 39, 8);
        p->optimizer = at[47];
        p->clip = get(at + 48, 8);
        if (!positive(p->rate) || p->optimizer > 1) return 0;
        if (!positive(p->clip) && p->clip != 0) return 0; /* zero has one form: not −0 */
        if (b.size == size + 25) { /* no decay has no bytes */
            p->decay = get(at + 56, 8);
            if (!positive(p->decay) || double_from(p->decay) >= 1) return 0;
        }
    }
    return p->directions > 0 && positive(p->sigma) && p->scheme < 3 && p->fidelity < 3 &&
           (kind.kind != 'b' || (kind.directions == p->directions && !p->steps));
}

/* ---- the command line -------------------------------------------------------------------------- */

static void *room(size_t size) {
    void *p = calloc(size + 1, 1);
    if (!p) abort();
    return p;
}

static bytes unhex(const char *text) {
    bytes b = {room(strlen(text) / 2), 0};
    unsigned x;
    while (*text != '-' && sscanf(text + 2 * b.size, "%2x", &x) == 1) b.data[b.size++] = (uint8_t)x;
    return b;
}

static uint64_t *numbers(char *text, int base, size_t *count) { /* comma-separated; text is cut up */
    uint64_t *out = room(8 * strlen(text));
    *count = 0;
    for (char *item = strtok(text, ","); item; item = strtok(NULL, ",")) {
        out[(*count)++] = strtoull(item, NULL, base);
    }
    return out;
}

static layout parse_layout(char *text) { /* names point into text */
    layout l;
    memset(&l, 0, sizeof l);
    for (char *item = strtok(text, ","); item; item = strtok(NULL, ",")) {
        char *at = strchr(item, '=');
        int t = l.tensors++;
        if (!at || t == TENSORS) abort();
        *at++ = 0;
        l.names[t] = item;
        while (*at) {
            if (l.dims[t] == 8) abort();
            l.shapes[t][l.dims[t]++] = strtoull(at, &at, 10);
            if (*at == 'x') at++;
        }
    }
    return l;
}

static void print_hex(const uint8_t *data, size_t size) {
    for (size_t i = 0; i < size; i++) printf("%02x", data[i]);
}

static void print_digest(sha256 *s) {
    uint8_t digest[32];
    sha_end(s, digest);
    print_hex(digest, 32);
}

static const char *separator(int first) { return first ? "" : " "; }

static uint64_t integer(const char *text) { return strtoull(text, NULL, 10); }

static void answer(char **w) {
    const char *command = w[0];
    sha256 s;
    stream st;
    perturbation p;
    layout l;
    size_t count;
    sha_init(&s);
    if (!strcmp(command, "table")) {
        for (int i = 0; i < 32768; i++) sha_add_int(&s, table[i], 2);
        print_digest(&s);
    } else if (!strcmp(command, "sha256")) {
        bytes b = unhex(w[1]);
        sha_add(&s, b.data, b.size);
        print_digest(&s);
    } else if (!strcmp(command, "philox")) {
        uint64_t *c = numbers(w[1], 16, &count), *k = numbers(w[2], 16, &count);
        uint32_t lanes[4] = {(uint32_t)c[0], (uint32_t)c[1], (uint32_t)c[2], (uint32_t)c[3]};
        philox(lanes, (uint32_t)k[0], (uint32_t)k[1]);
        for (int i = 0; i < 4; i++) printf("%s%08" PRIx32, separator(!i), lanes[i]);
    } else if (!strcmp(command, "seed")) {
        bytes b = unhex(w[1]);
        sha_add(&s, "baffle seed v1", 14);
        for (int i = 16; i--;) sha_add(&s, b.data + i, 1);
        print_digest(&s);
    } else if (!strcmp(command, "derive")) {
        bytes seed = unhex(w[1]);
        sha_add(&s, "baffle derive v1", 16);
        sha_add(&s, seed.data, 32);
        for (char *label = strtok(w[2], ","); label && *label != '-'; label = strtok(NULL, ",")) {
            bytes b = unhex(label);
            sha_add_int(&s, b.size, 4);
            sha_add(&s, b.data, b.size);
        }
        print_digest(&s);
    } else if (!strcmp(command, "words")) {
        uint64_t start = integer(w[4]), stop = integer(w[5]);
        st = stream_of(unhex(w[1]).data, integer(w[2]));
        for (uint64_t i = start; i < stop; i++)
            printf("%s%08" PRIx32, separator(i == start), word(&st, (uint32_t)integer(w[3]), i));
    } else if (!strcmp(command, "permutation")) {
        uint32_t k = (uint32_t)integer(w[3]);
        uint64_t n = integer(w[4]), *keys = room(8 * n), *order = room(8 * n);
        st = stream_of(unhex(w[1]).data, integer(w[2]));
        for (uint64_t i = 0, j; i < n; i++) { /* insertion sort: stable */
            keys[i] = word(&st, k, 2 * i) | (uint64_t)word(&st, k, 2 * i + 1) << 32;
            for (j = i; j > 0 && keys[order[j - 1]] > keys[i]; j--) order[j] = order[j - 1];
            order[j] = i;
        }
        for (uint64_t i = 0; i < n; i++) printf("%s%" PRIu64, separator(!i), order[i]);
    } else if (!strcmp(command, "values")) {
        uint64_t start = integer(w[6]), stop = integer(w[7]);
        if (!parse_spec(w[1], &p)) abort();
        l = parse_layout(w[2]);
        st = stream_of(unhex(w[3]).data, integer(w[4]));
        for (uint64_t i = start; i < stop; i++) {
            float z = value(&p, &st, (uint32_t)integer(w[5]), &l, i);
            printf("%s%08" PRIx32, separator(i == start), float_bits(z));
        }
    } else if (!strcmp(command, "gradient")) {
        uint64_t *slopes = numbers(w[5], 16, &count), n = 0;
        if (!parse_spec(w[1], &p)) abort();
        l = parse_layout(w[2]);
        st = stream_of(unhex(w[3]).data, integer(w[4]));
        for (int t = 0; t < l.tensors; t++) n += size_of(&l, t);
        for (uint64_t i = 0; i < n; i++) {
            double total = 0.0;
            for (size_t k = 0; k < count; k++)
                total = (double)value(&p, &st, (uint32_t)k, &l, i) * double_from(slopes[k]) + total;
            printf("%s%08" PRIx32, separator(!i), float_bits((float)(total / (double)count)));
        }
    } else if (!strcmp(command, "digest")) {
        bytes frozen = unhex(w[2]);
        l = parse_layout(w[1]);
        uint64_t *weights = numbers(w[3], 16, &count);
        sha_add(&s, "baffle weights v1", 17);
        sha_add(&s, frozen.data, frozen.size);
        for (int t = 0; t < l.tensors; t++) {
            sha_add_int(&s, strlen(l.names[t]), 4);
            sha_add(&s, l.names[t], strlen(l.names[t]));
            sha_add_int(&s, (uint64_t)l.dims[t], 4);
            for (int d = 0; d < l.dims[t]; d++) sha_add_int(&s, l.shapes[t][d], 8);
        }
        for (size_t i = 0; i < count; i++) sha_add_int(&s, weights[i], 4);
        print_digest(&s);
    } else if (!strcmp(command, "plan")) {
        static const char *const schemes[] = {"forward", "central", "tangent"};
        static const char *const optimizers[] = {"sgd", "adam"};
        static const char *const fidelities[] = {"forward-only", "law", "backprop"};
        plan q;
        uint8_t again[NAME + 200];
        if (!decode_plan(unhex(w[1]), &q)) {
            printf("refused");
            return;
        }
        printf("%" PRIu64 " ", q.round);
        print_hex(q.seed, 32);
        printf(" %" PRIu32 " %016" PRIx64 " %s %s %s %" PRIu32 " ", q.directions, q.sigma,
               schemes[q.scheme], q.spec, fidelities[q.fidelity], q.batch_size);
        print_hex(q.digest, 32);
        if (q.epochs)
            printf(" %u %016" PRIx64 " %s %016" PRIx64, (unsigned)q.epochs, q.rate,
                   optimizers[q.optimizer], q.clip);
        if (q.decay) printf(" %016" PRIx64, q.decay);
        if (q.steps) printf(" %u %016" PRIx64, (unsigned)q.steps, q.rate);
        printf(" ");
        print_hex(again, encode_plan(&q, again));
    } else if (!strcmp(command, "result")) {
        bytes b = unhex(w[1]);
        uint64_t *values = numbers(w[3], 16, &count);
        uint8_t head[58] = "BFFL\1\3", raw[4];
        plan q;
        if (!decode_plan(b, &q) || !integer(w[2]) || !count) {
            printf("refused");
            return;
        }
        sha_add(&s, b.data, b.size);
        put(head + 6, q.round, 8);
        sha_end(&s, head + 14);
        put(head + 46, integer(w[2]), 8);
        put(head + 54, count, 4);
        print_hex(head, 58);
        for (size_t i = 0; i < count; i++) put(raw, values[i], 4), print_hex(raw, 4);
    } else {
        abort();
    }
}

int main(int argc, char **argv) {
    static char line[LINE];
    static uint8_t raw[65536];
    FILE *file = argc == 2 ? fopen(argv[1], "rb") : NULL;
    if (!file || fread(raw, 1, sizeof raw, file) != sizeof raw || fgetc(file) != EOF) {
        fprintf(stderr, "usage: reference gaussian15.bin < commands\n");
        return 2;
    }
    fclose(file);
    for (int i = 0; i < 32768; i++) table[i] = (uint16_t)get(raw + 2 * i, 2);
    while (fgets(line, sizeof line, stdin)) {
        static char none[] = "";
        char *words[8] = {none, none, none, none, none, none, none, none};
        int count = 0;
        for (char *at = strtok(line, " \n"); at && count < 8; at = strtok(NULL, " \n")) words[count++] = at;
        answer(words);
        printf("\n");
    }
    return 0;
}
