/* MD5 of 16 messages side by side.

   Each step of MD5 waits for the one before: one message alone leaves most units of a core idle. The parts of a
   multipart object are messages of one length, and steps of different messages do not wait for each other. So a vector
   holds one word of each message. The compiler splits vectors wider than the processor's registers, of 8 words (AVX2)
   or 4 (SSE2, NEON). 16 lanes hide the latency better than as many as one register holds. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <endian.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define BLOCK 64
#define INLINED static inline __attribute__((always_inline))

typedef uint32_t vector __attribute__((vector_size(4 * LANES)));

static const uint32_t CONSTANTS[64] = {
    0xd76aa478, 0xe8c7b756, 0x242070db, 0xc1bdceee, 0xf57c0faf, 0x4787c62a, 0xa8304613, 0xfd469501,
    0x698098d8, 0x8b44f7af, 0xffff5bb1, 0x895cd7be, 0x6b901122, 0xfd987193, 0xa679438e, 0x49b40821,
    0xf61e2562, 0xc040b340, 0x265e5a51, 0xe9b6c7aa, 0xd62f105d, 0x02441453, 0xd8a1e681, 0xe7d3fbc8,
    0x21e1cde6, 0xc33707d6, 0xf4d50d87, 0x455a14ed, 0xa9e3e905, 0xfcefa3f8, 0x676f02d9, 0x8d2a4c8a,
    0xfffa3942, 0x8771f681, 0x6d9d6122, 0xfde5380c, 0xa4beea44, 0x4bdecfa9, 0xf6bb4b60, 0xbebfbc70,
    0x289b7ec6, 0xeaa127fa, 0xd4ef3085, 0x04881d05, 0xd9d4d039, 0xe6db99e5, 0x1fa27cf8, 0xc4ac5665,
    0xf4292244, 0x432aff97, 0xab9423a7, 0xfc93a039, 0x655b59c3, 0x8f0ccc92, 0xffeff47d, 0x85845dd1,
    0x6fa87e4f, 0xfe2ce6e0, 0xa3014314, 0x4e0811a1, 0xf7537e82, 0xbd3af235, 0x2ad7d2bb, 0xeb86d391,
};
static const int SHIFTS[4][4] = {{7, 12, 17, 22}, {5, 9, 14, 20}, {4, 11, 16, 23}, {6, 10, 15, 21}};

/* Load a block of each message, word by word: each vector gets one word of all messages. */
INLINED void load(vector words[16], const unsigned char *data, size_t stride)
{
    for (size_t lane = 0; lane < LANES; lane++)
        for (size_t number = 0; number < 16; number++) {
            uint32_t word;
            memcpy(&word, data + lane * stride + 4 * number, sizeof word);
            words[number][lane] = le32toh(word);
        }
}

/* RFC 1321, 3.4. The loop must be unrolled, so that everything that depends only on the step is constant. */
INLINED void add(vector state[4], const unsigned char *data, size_t stride)
{
    for (size_t offset = 0; offset < stride; offset += BLOCK) {
        vector words[16], a = state[0], b = state[1], c = state[2], d = state[3];

        load(words, data + offset, stride);
#pragma GCC unroll 64
        for (unsigned step = 0; step < 64; step++) {
            unsigned word;
            vector mixed;

            if (step < 16) {
                mixed = d ^ (b & (c ^ d));
                word = step;
            } else if (step < 32) {
                mixed = c ^ (d & (b ^ c));
                word = (5 * step + 1) % 16;
            } else if (step < 48) {
                mixed = b ^ c ^ d;
                word = (3 * step + 5) % 16;
            } else {
                mixed = c ^ (b | ~d);
                word = 7 * step % 16;
            }
            int shift = SHIFTS[step / 16][step % 4];
            vector sum = a + mixed + CONSTANTS[step] + words[word];
            a = d;
            d = c;
            c = b;
            b += (sum << shift) | (sum >> (32 - shift));
        }
        state[0] += a;
        state[1] += b;
        state[2] += c;
        state[3] += d;
    }
}

static void add_anywhere(vector state[4], const unsigned char *data, size_t stride)
{
    add(state, data, stride);
}

#if defined(__x86_64__) && !defined(PORTABLE)
__attribute__((target("avx2"))) static void add_by_avx2(vector state[4], const unsigned char *data, size_t stride)
{
    add(state, data, stride);
}
#endif

static void (*chosen)(vector state[4], const unsigned char *data, size_t stride) = add_anywhere;

static PyObject *update(PyObject *module, PyObject *arguments)
{
    Py_buffer state, data;
    PyObject *result = NULL;
    vector words[4];

    (void)module;
    if (!PyArg_ParseTuple(arguments, "w*y*", &state, &data))
        return NULL;
    if (state.len != sizeof words || data.len % (LANES * BLOCK) != 0) {
        PyErr_SetString(PyExc_ValueError, "a state has 256 bytes, and data a multiple of 1024");
    } else {
        Py_BEGIN_ALLOW_THREADS
        memcpy(words, state.buf, sizeof words);
        chosen(words, data.buf, (size_t)data.len / LANES);
        memcpy(state.buf, words, sizeof words);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&state);
    PyBuffer_Release(&data);
    return result;
}

static PyMethodDef functions[] = {
    {"update", update, METH_VARARGS, "Add to the states of all messages the next bytes of each."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_md5", .m_doc = "MD5 of 16 messages side by side.", .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__md5(void)
{
#if defined(__x86_64__) && !defined(PORTABLE)
    if (__builtin_cpu_supports("avx2"))
        chosen = add_by_avx2;
#endif
    PyObject *module = PyModule_Create(&definition);

    if (module != NULL && PyModule_AddIntConstant(module, "LANES", LANES) < 0)
        Py_CLEAR(module);
    return module;
}
