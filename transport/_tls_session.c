/* One TLS connection over a non-blocking socket.
 *
 * Nothing here waits: reading takes what the socket has, writing encrypts into a buffer that flush() empties as far as
 * the socket takes it. A lock keeps OpenSSL's state to one thread at a time; it is held for as long as the work takes
 * (a frame at most), and never while the interpreter's lock is waited for.
 */
#include "_tls.h"

#include <errno.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <pythread.h>
#include <string.h>
#include <sys/socket.h>

enum {
    READ_AHEAD = 64 * 1024,  /* bytes asked of the socket at once: decrypted where they are, in the first caches */
    OUT_CAP = 4 * 1024 * 1024, /* encrypted bytes not yet flushed, at most */
};

struct session {
    PyObject_HEAD
    PyObject *context;
    SSL *ssl;
    PyThread_type_lock lock;
    int descriptor;
    int error_number; /* errno of the last failed receive */
    int ended;        /* the peer closed its side */
    int broken;       /* OpenSSL gave up on it, and said why only once: */
    struct failure why;
    unsigned char *out;
    size_t out_size, out_begin, out_end;
    unsigned long long received, sent, rekey_after, until_rekey;
};

/* -- OpenSSL's way to the socket and to the buffer */

static BIO_METHOD *wire_method;

static int wire_read(BIO *wire, char *data, int size) {
    struct session *self = BIO_get_data(wire);
    BIO_clear_retry_flags(wire);
    ssize_t count;
    do
        count = recv(self->descriptor, data, (size_t)size, MSG_DONTWAIT);
    while (count < 0 && errno == EINTR);
    if (count > 0)
        self->received += (unsigned long long)count;
    else if (count == 0)
        self->ended = 1;
    else if (errno == EAGAIN || errno == EWOULDBLOCK)
        BIO_set_retry_read(wire);
    else
        self->error_number = errno;
    return (int)count;
}

static int wire_write(BIO *wire, const char *data, int size) {
    struct session *self = BIO_get_data(wire);
    BIO_clear_retry_flags(wire);
    size_t needed = self->out_end + (size_t)size;
    if (needed > self->out_size) {
        unsigned char *grown = needed <= OUT_CAP ? realloc(self->out, needed) : NULL;
        if (!grown) {
            self->error_number = ENOBUFS;
            return -1;
        }
        self->out = grown;
        self->out_size = needed;
    }
    memcpy(self->out + self->out_end, data, (size_t)size);
    self->out_end += (size_t)size;
    return size;
}

static long wire_control(BIO *wire, int command, long number, void *pointer) {
    (void)number, (void)pointer;
    if (command == BIO_CTRL_EOF)
        return ((struct session *)BIO_get_data(wire))->ended;
    return command == BIO_CTRL_FLUSH;
}

static BIO *make_wire(struct session *self) {
    if (!wire_method) { /* made once, under the interpreter's lock */
        int index = BIO_get_new_index();
        BIO_METHOD *method = index < 0 ? NULL : BIO_meth_new(index | BIO_TYPE_SOURCE_SINK, "replicator wire");
        if (!method)
            return NULL;
        BIO_meth_set_read(method, wire_read);
        BIO_meth_set_write(method, wire_write);
        BIO_meth_set_ctrl(method, wire_control);
        wire_method = method;
    }
    BIO *wire = BIO_new(wire_method);
    if (wire) {
        BIO_set_data(wire, self);
        BIO_set_init(wire, 1);
    }
    return wire;
}

/* -- beginning and end */

static int set_name(struct session *self, const char *name) {
    /* The certificate must have this very name; wildcards and the common name mean nothing. */
    SSL_set_hostflags(self->ssl, X509_CHECK_FLAG_NO_WILDCARDS | X509_CHECK_FLAG_NEVER_CHECK_SUBJECT);
    return SSL_set1_host(self->ssl, name) && SSL_set_tlsext_host_name(self->ssl, name);
}

static int fill(struct session *self, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"context", "descriptor", "server_name", NULL};
    PyObject *given;
    int descriptor;
    const char *name = NULL;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O!i|z:Session", names, context_type, &given, &descriptor,
                                     &name))
        return -1;
    struct context *context = (struct context *)given;
    if ((name && (!*name || context->server)) || (!name && !context->server && context->verifies)) {
        PyErr_SetString(PyExc_ValueError, "a client that verifies names its server, and a server names nobody");
        return -1;
    }
    ERR_clear_error();
    self->context = Py_NewRef(given);
    self->descriptor = descriptor;
    self->rekey_after = self->until_rekey = context->rekey_after;
    self->lock = PyThread_allocate_lock();
    self->ssl = SSL_new(context->ssl);
    BIO *wire = self->ssl ? make_wire(self) : NULL;
    if (!self->lock || !wire) {
        PyErr_NoMemory();
        return -1;
    }
    SSL_set_bio(self->ssl, wire, wire);
    SSL_set_read_ahead(self->ssl, 1);
    SSL_set_default_read_buffer_len(self->ssl, READ_AHEAD);
    if (context->server)
        SSL_set_accept_state(self->ssl);
    else
        SSL_set_connect_state(self->ssl);
    if (name && !(context->verifies ? set_name(self, name) : SSL_set_tlsext_host_name(self->ssl, name))) {
        struct failure failure = {0};
        failure_take(&failure, NULL);
        failure_raise(&failure);
        return -1;
    }
    return 0;
}

static PyObject *session_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    struct session *self = (struct session *)type->tp_alloc(type, 0);
    if (self && fill(self, arguments, keywords) < 0)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void session_dealloc(struct session *self) {
    PyTypeObject *type = Py_TYPE(self);
    SSL_free(self->ssl);
    free(self->out);
    if (self->lock)
        PyThread_free_lock(self->lock);
    Py_XDECREF(self->context);
    type->tp_free(self);
    Py_DECREF(type);
}

/* -- work; what stands between these two is done without the interpreter's lock */

#define WORK_BEGIN(self)                      \
    Py_BEGIN_ALLOW_THREADS                    \
    PyThread_acquire_lock((self)->lock, WAIT_LOCK); \
    ERR_clear_error();                        \
    (self)->error_number = 0;
#define WORK_END(self)                  \
    PyThread_release_lock((self)->lock); \
    Py_END_ALLOW_THREADS

enum outcome { DONE, WOULD_BLOCK, END, FAILED };

/* What OpenSSL means by a result that is not a success. */
static enum outcome judge(struct session *self, int result, struct failure *failure) {
    switch (SSL_get_error(self->ssl, result)) {
        case SSL_ERROR_WANT_READ:
            return WOULD_BLOCK;
        case SSL_ERROR_ZERO_RETURN:
            return END;
        default:
            failure->error_number = self->error_number;
            failure_take(failure, self->ssl);
            if (!failure->error_number && !failure->code) {
                if (self->ended && !self->broken)
                    return END;
                failure->error_number = EPROTO;
            }
            if (!self->broken)
                self->why = *failure;
            self->broken = 1;
            *failure = self->why;
            return FAILED;
    }
}

static PyObject *session_handshake(struct session *self, PyObject *nothing) {
    (void)nothing;
    enum outcome outcome = DONE;
    struct failure failure = {0};
    WORK_BEGIN(self)
    int result = SSL_do_handshake(self->ssl);
    if (result != 1)
        outcome = judge(self, result, &failure);
    WORK_END(self)
    if (outcome == END)
        failure.error_number = ECONNRESET;
    return outcome == FAILED || outcome == END ? failure_raise(&failure) : PyBool_FromLong(outcome == DONE);
}

static PyObject *session_read_into(struct session *self, PyObject *target) {
    Py_buffer view;
    if (PyObject_GetBuffer(target, &view, PyBUF_WRITABLE) < 0)
        return NULL;
    enum outcome outcome = DONE;
    struct failure failure = {0};
    size_t size = (size_t)view.len, got = 0;
    WORK_BEGIN(self)
    while (got < size) {
        size_t count = 0;
        int result = SSL_read_ex(self->ssl, (char *)view.buf + got, size - got, &count);
        if (result != 1) {
            outcome = judge(self, result, &failure);
            break;
        }
        got += count;
    }
    WORK_END(self)
    PyBuffer_Release(&view);
    if (got || outcome == END)
        return PyLong_FromSize_t(got); /* an error comes again with the next call */
    if (outcome == FAILED)
        return failure_raise(&failure);
    Py_RETURN_NONE;
}

static PyObject *session_write(struct session *self, PyObject *source) {
    Py_buffer view;
    if (PyObject_GetBuffer(source, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    enum outcome outcome = DONE;
    struct failure failure = {0};
    size_t size = (size_t)view.len, written = 0;
    WORK_BEGIN(self)
    while (written < size && outcome == DONE) {
        size_t count = 0;
        int result = SSL_write_ex(self->ssl, (const char *)view.buf + written, size - written, &count);
        if (result != 1)
            outcome = judge(self, result, &failure);
        written += count;
    }
    if (outcome == DONE && written >= self->until_rekey) {
        self->until_rekey = self->rekey_after;
        SSL_key_update(self->ssl, SSL_KEY_UPDATE_NOT_REQUESTED); /* goes out before the next record */
    } else
        self->until_rekey -= written;
    WORK_END(self)
    PyBuffer_Release(&view);
    if (outcome == DONE)
        Py_RETURN_NONE;
    if (outcome != FAILED)
        failure.error_number = outcome == END ? ECONNRESET : EPROTO; /* this buffer never blocks */
    return failure_raise(&failure);
}

static PyObject *session_flush(struct session *self, PyObject *argument) {
    int more = PyObject_IsTrue(argument);
    if (more < 0)
        return NULL;
    struct failure failure = {0};
    int empty;
    WORK_BEGIN(self)
    while (self->out_begin < self->out_end) {
        ssize_t count = send(self->descriptor, self->out + self->out_begin, self->out_end - self->out_begin,
                             MSG_DONTWAIT | MSG_NOSIGNAL | (more ? MSG_MORE : 0));
        if (count < 0) {
            if (errno == EINTR)
                continue;
            if (errno != EAGAIN && errno != EWOULDBLOCK)
                failure.error_number = errno;
            break;
        }
        self->out_begin += (size_t)count;
        self->sent += (unsigned long long)count;
    }
    empty = self->out_begin == self->out_end;
    if (empty)
        self->out_begin = self->out_end = 0;
    WORK_END(self)
    return failure.error_number ? failure_raise(&failure) : PyBool_FromLong(empty);
}

static PyObject *session_detach(struct session *self, PyObject *nothing) {
    (void)nothing;
    WORK_BEGIN(self)
    self->descriptor = -1;
    WORK_END(self)
    Py_RETURN_NONE;
}

/* -- what was agreed on */

static PyObject *session_protocol(struct session *self, void *nothing) {
    (void)nothing;
    const unsigned char *name;
    unsigned int size;
    SSL_get0_alpn_selected(self->ssl, &name, &size);
    if (!size)
        Py_RETURN_NONE;
    return PyUnicode_DecodeASCII((const char *)name, size, NULL);
}

static PyObject *session_cipher(struct session *self, void *nothing) {
    (void)nothing;
    return PyUnicode_FromString(SSL_get_cipher_name(self->ssl));
}

static PyObject *session_peer_certificate(struct session *self, void *nothing) {
    (void)nothing;
    X509 *certificate = SSL_get1_peer_certificate(self->ssl);
    if (!certificate)
        Py_RETURN_NONE;
    unsigned char *data = NULL;
    int size = i2d_X509(certificate, &data);
    X509_free(certificate);
    if (size < 0)
        return PyErr_NoMemory();
    PyObject *made = PyBytes_FromStringAndSize((const char *)data, size);
    OPENSSL_free(data);
    return made;
}

static PyObject *session_received(struct session *self, void *nothing) {
    (void)nothing;
    return PyLong_FromUnsignedLongLong(self->received);
}

static PyObject *session_sent(struct session *self, void *nothing) {
    (void)nothing;
    return PyLong_FromUnsignedLongLong(self->sent);
}

static PyMethodDef session_methods[] = {
    {"handshake", (PyCFunction)session_handshake, METH_NOARGS, "Go on with the handshake; whether it is complete."},
    {"read_into", (PyCFunction)session_read_into, METH_O, "Bytes read, 0 at the end, None if nothing is there yet."},
    {"write", (PyCFunction)session_write, METH_O, "Encrypt all of a buffer into what is to be flushed."},
    {"flush", (PyCFunction)session_flush, METH_O, "Send what the socket takes; whether that was all."},
    {"detach", (PyCFunction)session_detach, METH_NOARGS, "The socket is no longer ours."},
    {0},
};
static PyGetSetDef session_properties[] = {
    {"protocol", (getter)session_protocol, NULL, "The protocol agreed on, or None.", NULL},
    {"cipher", (getter)session_cipher, NULL, "The cipher agreed on.", NULL},
    {"peer_certificate", (getter)session_peer_certificate, NULL, "The peer's certificate, DER, or None.", NULL},
    {"received", (getter)session_received, NULL, "Bytes taken from the socket.", NULL},
    {"sent", (getter)session_sent, NULL, "Bytes given to the socket.", NULL},
    {0},
};
static PyType_Slot session_slots[] = {
    {Py_tp_doc, "One TLS connection over a non-blocking socket."},
    {Py_tp_new, session_new},
    {Py_tp_dealloc, session_dealloc},
    {Py_tp_methods, session_methods},
    {Py_tp_getset, session_properties},
    {0, NULL},
};
PyType_Spec session_spec = {
    .name = "transport._tls.Session",
    .basicsize = sizeof(struct session),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = session_slots,
};
