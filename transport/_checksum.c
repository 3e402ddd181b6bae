/* transport._checksum: CRC32C, keyed BLAKE3 of blocks, and zero detection, for Python.
 *
 * This file looks at arguments and lets go of the GIL; transport/checksum.py says what the functions are for, and
 * _checksum.h what lies below. Buffers are held for the whole of a call, so nobody can resize them meanwhile.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string.h>

#include "_checksum.h"

/* Below this, letting go of the GIL and taking it again costs more than it gives others. */
#define GIL_KEPT_BELOW (8 * 1024)

/* Runs a statement, without the GIL if there is enough to do. */
#define WITHOUT_GIL(bytes, statement)           \
    do {                                        \
        if ((size_t)(bytes) < GIL_KEPT_BELOW) { \
            statement;                          \
        } else {                                \
            Py_BEGIN_ALLOW_THREADS;             \
            statement;                          \
            Py_END_ALLOW_THREADS;               \
        }                                       \
    } while (0)

/* The implementation of that name, or the fastest for NULL; NULL with ValueError set if there is none. */
static const struct implementation *choose(const char *name) {
    const struct implementation *found = NULL;
    for (size_t i = 0; implementation(i) != NULL; i++) {
        found = implementation(i);
        if (name != NULL && strcmp(found->name, name) == 0)
            return found;
    }
    if (name == NULL)
        return found;
    PyErr_Format(PyExc_ValueError, "no checksum implementation '%s' on this processor; see implementations()", name);
    return NULL;
}

static int check_key(const Py_buffer *key) {
    if (key->len == KEY_BYTES)
        return 0;
    PyErr_Format(PyExc_ValueError, "key has %zd bytes, a BLAKE3 key has %d", key->len, KEY_BYTES);
    return -1;
}

static int check_block_size(Py_ssize_t block_size) {
    if (block_size >= 1 && block_size <= (Py_ssize_t)BLOCK_SIZE_MAX)
        return 0;
    PyErr_Format(PyExc_ValueError, "block_size is %zd, must be 1 to %u", block_size, BLOCK_SIZE_MAX);
    return -1;
}

static int check_digest_size(Py_ssize_t digest_size) {
    if (digest_size >= 16 && digest_size <= CV_BYTES)
        return 0;
    PyErr_Format(PyExc_ValueError, "digest_size is %zd, must be 16 to %d", digest_size, CV_BYTES);
    return -1;
}

static Py_ssize_t count_blocks(Py_ssize_t length, Py_ssize_t block_size) {
    return length / block_size + (length % block_size != 0);
}

static int overlaps(const Py_buffer *a, const Py_buffer *b) {
    const uintptr_t a_start = (uintptr_t)a->buf, b_start = (uintptr_t)b->buf;
    return a_start < b_start + (size_t)b->len && b_start < a_start + (size_t)a->len;
}

/* An output argument's buffer. */
static int get_output(const char *name, PyObject *object, Py_buffer *output) {
    if (PyObject_GetBuffer(object, output, PyBUF_WRITABLE) == 0)
        return 0;
    if (PyErr_ExceptionMatches(PyExc_BufferError))
        PyErr_Format(PyExc_BufferError, "%s must be writable and contiguous", name);
    return -1;
}

/* Room for `blocks` entries of `each` bytes in an output that lies apart from the data. */
static int check_output(const char *name, const Py_buffer *output, const Py_buffer *data, Py_ssize_t blocks,
                        Py_ssize_t each) {
    if (output->len / each < blocks) {
        PyErr_Format(PyExc_ValueError, "%s has %zd bytes, %zd blocks of %zd bytes each need %zd", name, output->len,
                     blocks, each, blocks * each);
        return -1;
    }
    if (overlaps(output, data)) {
        PyErr_Format(PyExc_ValueError, "%s lies in the memory of data", name);
        return -1;
    }
    return 0;
}

PyDoc_STRVAR(crc32c_doc, "crc32c($module, data, value=0, implementation=None, /)\n--\n\n"
                         "CRC32C of data, continuing from the CRC32C `value` of what came before it.");

static PyObject *py_crc32c(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count) {
    unsigned long value = 0;
    const char *name = NULL;
    if (count < 1 || count > 3) {
        PyErr_Format(PyExc_TypeError, "crc32c() takes 1 to 3 arguments (%zd given)", count);
        return NULL;
    }
    if (count >= 2) {
        value = PyLong_AsUnsignedLong(args[1]);
        if (value == (unsigned long)-1 && PyErr_Occurred()) {
            if (PyErr_ExceptionMatches(PyExc_OverflowError))
                PyErr_SetString(PyExc_ValueError, "value is not a CRC32C: must be 0 to 2**32 - 1");
            return NULL;
        }
        if (value > UINT32_MAX) {
            PyErr_SetString(PyExc_ValueError, "value is not a CRC32C: must be 0 to 2**32 - 1");
            return NULL;
        }
    }
    if (count >= 3 && args[2] != Py_None && (name = PyUnicode_AsUTF8(args[2])) == NULL)
        return NULL;
    const struct implementation *chosen = choose(name);
    if (chosen == NULL)
        return NULL;
    Py_buffer data;
    if (PyObject_GetBuffer(args[0], &data, PyBUF_SIMPLE) != 0)
        return NULL;
    uint32_t state = ~(uint32_t)value;
    WITHOUT_GIL(data.len, state = chosen->crc32c(state, data.buf, (size_t)data.len));
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLong(~state & UINT32_MAX);
}

PyDoc_STRVAR(digest_blocks_into_doc,
             "digest_blocks_into($module, data, key, digests, zeros, block_size, digest_size, implementation=None, /)\n"
             "--\n\n"
             "Keyed BLAKE3 of each block into digests, and whether it is all zeros into zeros unless that is None.\n"
             "Returns the number of blocks.");

static PyObject *py_digest_blocks_into(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer data, key, digests = {.obj = NULL}, zeros = {.obj = NULL};
    PyObject *digests_object, *zeros_object, *result = NULL;
    Py_ssize_t block_size, digest_size;
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "y*y*OOnn|z:digest_blocks_into", &data, &key, &digests_object, &zeros_object,
                          &block_size, &digest_size, &name))
        return NULL;
    const struct implementation *chosen = choose(name);
    if (chosen == NULL || check_key(&key) != 0 || check_block_size(block_size) != 0 ||
        check_digest_size(digest_size) != 0)
        goto done;
    const int with_zeros = zeros_object != Py_None;
    if (get_output("digests", digests_object, &digests) != 0 ||
        (with_zeros && get_output("zeros", zeros_object, &zeros) != 0))
        goto done;
    const Py_ssize_t blocks = count_blocks(data.len, block_size);
    if (check_output("digests", &digests, &data, blocks, digest_size) != 0 ||
        (with_zeros && check_output("zeros", &zeros, &data, blocks, 1) != 0))
        goto done;
    const struct digest_request request = {
        .implementation = chosen,
        .data = data.buf,
        .length = (size_t)data.len,
        .block_size = (size_t)block_size,
        .key = key.buf,
        .digests = digests.buf,
        .digest_size = (size_t)digest_size,
        .zeros = with_zeros ? zeros.buf : NULL,
    };
    int failed;
    WITHOUT_GIL(data.len, failed = blake3_digest_blocks(&request));
    result = failed ? PyErr_NoMemory() : PyLong_FromSsize_t(blocks);
done:
    PyBuffer_Release(&zeros); /* nothing, where there is none */
    PyBuffer_Release(&digests);
    PyBuffer_Release(&key);
    PyBuffer_Release(&data);
    return result;
}

PyDoc_STRVAR(keyed_digest_doc, "keyed_digest($module, key, data, implementation=None, /)\n--\n\n"
                               "Keyed BLAKE3 of data, 32 bytes.");

static PyObject *py_keyed_digest(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer key, data;
    PyObject *result = NULL;
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "y*y*|z:keyed_digest", &key, &data, &name))
        return NULL;
    const struct implementation *chosen = choose(name);
    if (chosen != NULL && check_key(&key) == 0) {
        uint8_t digest[CV_BYTES];
        int failed;
        WITHOUT_GIL(data.len, failed = blake3_keyed(chosen, data.buf, (size_t)data.len, key.buf, digest));
        result = failed ? PyErr_NoMemory() : PyBytes_FromStringAndSize((const char *)digest, sizeof digest);
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&key);
    return result;
}

PyDoc_STRVAR(is_zero_doc, "is_zero($module, data, implementation=None, /)\n--\n\n"
                          "Whether data is nothing but zeros (an empty buffer is).");

static PyObject *py_is_zero(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer data;
    PyObject *result = NULL;
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "y*|z:is_zero", &data, &name))
        return NULL;
    const struct implementation *chosen = choose(name);
    if (chosen != NULL) {
        int zero;
        WITHOUT_GIL(data.len, zero = chosen->is_zero(data.buf, (size_t)data.len));
        result = PyBool_FromLong(zero);
    }
    PyBuffer_Release(&data);
    return result;
}

static void map_zeros(const struct implementation *chosen, const uint8_t *data, size_t length, size_t block_size,
                      uint8_t *zeros) {
    while (length != 0) {
        const size_t size = length < block_size ? length : block_size;
        *zeros++ = (uint8_t)chosen->is_zero(data, size);
        data += size, length -= size;
    }
}

PyDoc_STRVAR(zero_map_doc, "zero_map($module, data, block_size, zeros, implementation=None, /)\n--\n\n"
                           "Writes 1 to zeros for each block that is nothing but zeros, else 0.\n"
                           "Returns the number of blocks.");

static PyObject *py_zero_map(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer data, zeros = {.obj = NULL};
    PyObject *zeros_object, *result = NULL;
    Py_ssize_t block_size;
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "y*nO|z:zero_map", &data, &block_size, &zeros_object, &name))
        return NULL;
    const struct implementation *chosen = choose(name);
    if (chosen == NULL || check_block_size(block_size) != 0 || get_output("zeros", zeros_object, &zeros) != 0)
        goto done;
    const Py_ssize_t blocks = count_blocks(data.len, block_size);
    if (check_output("zeros", &zeros, &data, blocks, 1) != 0)
        goto done;
    WITHOUT_GIL(data.len, map_zeros(chosen, data.buf, (size_t)data.len, (size_t)block_size, zeros.buf));
    result = PyLong_FromSsize_t(blocks);
done:
    PyBuffer_Release(&zeros);
    PyBuffer_Release(&data);
    return result;
}

static int append_index(PyObject *list, Py_ssize_t index) {
    PyObject *number = PyLong_FromSsize_t(index);
    if (number == NULL)
        return -1;
    int failed = PyList_Append(list, number);
    Py_DECREF(number);
    return failed;
}

PyDoc_STRVAR(differing_blocks_doc, "differing_blocks($module, ours, theirs, digest_size, /)\n--\n\n"
                                   "Indexes of the blocks whose digests differ, and of those only one side has.");

static PyObject *py_differing_blocks(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer ours, theirs;
    Py_ssize_t each;
    PyObject *list = NULL;
    if (!PyArg_ParseTuple(args, "y*y*n:differing_blocks", &ours, &theirs, &each))
        return NULL;
    if (check_digest_size(each) != 0)
        goto done;
    if (ours.len % each != 0 || theirs.len % each != 0) {
        PyErr_Format(PyExc_ValueError, "%zd and %zd bytes are not both whole digests of %zd bytes", ours.len,
                     theirs.len, each);
        goto done;
    }
    if ((list = PyList_New(0)) == NULL)
        goto done;
    const Py_ssize_t shorter = (ours.len < theirs.len ? ours.len : theirs.len) / each;
    const Py_ssize_t longer = (ours.len > theirs.len ? ours.len : theirs.len) / each;
    for (Py_ssize_t block = 0; block < longer; block++) {
        if (block < shorter && memcmp((char *)ours.buf + block * each, (char *)theirs.buf + block * each, each) == 0)
            continue;
        if (append_index(list, block) != 0) {
            Py_CLEAR(list);
            break;
        }
    }
done:
    PyBuffer_Release(&theirs);
    PyBuffer_Release(&ours);
    return list;
}

static int append_name(PyObject *list, const char *name) {
    PyObject *text = PyUnicode_FromString(name);
    if (text == NULL)
        return -1;
    int failed = PyList_Append(list, text);
    Py_DECREF(text);
    return failed;
}

static PyObject *to_tuple(PyObject *list, int failed) {
    PyObject *tuple = failed ? NULL : PyList_AsTuple(list);
    Py_DECREF(list);
    return tuple;
}

PyDoc_STRVAR(implementations_doc, "implementations($module, /)\n--\n\n"
                                  "Names of the implementations this processor can run, slowest first.");

static PyObject *py_implementations(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused)) {
    PyObject *names = PyList_New(0);
    if (names == NULL)
        return NULL;
    int failed = 0;
    for (size_t i = 0; implementation(i) != NULL && !failed; i++)
        failed = append_name(names, implementation(i)->name);
    return to_tuple(names, failed);
}

PyDoc_STRVAR(cpu_features_doc, "cpu_features($module, /)\n--\n\n"
                               "Names of the instruction sets in use that this processor and its system support.");

static PyObject *py_cpu_features(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused)) {
    PyObject *names = PyList_New(0);
    if (names == NULL)
        return NULL;
    int failed = 0;
    for (size_t i = 0; cpu_feature(i) != NULL && !failed; i++)
        if (cpu_feature(i)->present)
            failed = append_name(names, cpu_feature(i)->name);
    return to_tuple(names, failed);
}

static PyMethodDef methods[] = {
    {"crc32c", (PyCFunction)(void (*)(void))py_crc32c, METH_FASTCALL, crc32c_doc},
    {"digest_blocks_into", py_digest_blocks_into, METH_VARARGS, digest_blocks_into_doc},
    {"keyed_digest", py_keyed_digest, METH_VARARGS, keyed_digest_doc},
    {"is_zero", py_is_zero, METH_VARARGS, is_zero_doc},
    {"zero_map", py_zero_map, METH_VARARGS, zero_map_doc},
    {"differing_blocks", py_differing_blocks, METH_VARARGS, differing_blocks_doc},
    {"implementations", py_implementations, METH_NOARGS, implementations_doc},
    {"cpu_features", py_cpu_features, METH_NOARGS, cpu_features_doc},
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *Py_UNUSED(module)) {
    cpu_set_up();
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, execute}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "transport._checksum",
    .m_doc = "CRC32C, keyed BLAKE3 of blocks, and zero detection.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__checksum(void) { return PyModuleDef_Init(&definition); }
