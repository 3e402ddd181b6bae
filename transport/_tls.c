/* The module transport._tls: how sessions are made, and OpenSSL's errors as exceptions.
 *
 * Only OpenSSL's documented interface is used, and nothing cryptographic is done here. Python's own ssl module hands
 * over one record of 16 KiB a call and copies every byte three times more than needed, which was a third of what a
 * receiving node's processor did; it can neither choose the cipher of TLS 1.3 nor renew its keys.
 */
#include "_tls.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <string.h>

PyObject *tls_error;
PyTypeObject *context_type;

/* AES-128 first: as safe as the certificates' P-256 keys, and a fifth cheaper than AES-256. */
static const char CIPHERS[] = "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256";

/* RFC 8446, 5.5: about 2^24.5 records, 388 GiB, are safe under one key of AES-GCM. Far below that a new one is made. */
static const unsigned long long REKEY_AFTER = 64ull << 30;

void failure_take(struct failure *failure, SSL *ssl) {
    failure->code = ERR_peek_last_error();
    failure->verify_code = X509_V_OK;
    if (ssl && ERR_GET_LIB(failure->code) == ERR_LIB_SSL &&
        ERR_GET_REASON(failure->code) == SSL_R_CERTIFICATE_VERIFY_FAILED)
        failure->verify_code = SSL_get_verify_result(ssl);
    ERR_clear_error();
}

PyObject *failure_raise(const struct failure *failure) {
    if (failure->error_number) {
        errno = failure->error_number;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    const char *reason = failure->verify_code != X509_V_OK ? X509_verify_cert_error_string(failure->verify_code)
                                                           : ERR_reason_error_string(failure->code);
    PyObject *arguments = Py_BuildValue("(sl)", reason ? reason : "unknown error", failure->verify_code);
    if (arguments) {
        PyErr_SetObject(tls_error, arguments);
        Py_DECREF(arguments);
    }
    return NULL;
}

static int raise_here(void) {
    struct failure failure = {0};
    failure_take(&failure, NULL);
    failure_raise(&failure);
    return -1;
}

/* A key with a passphrase is an error, never a question on the terminal. */
static int no_passphrase(char *buffer, int size, int writing, void *data) {
    (void)buffer, (void)size, (void)writing, (void)data;
    return -1;
}

static int choose_protocol(SSL *ssl, const unsigned char **chosen, unsigned char *size, const unsigned char *offered,
                           unsigned int offered_size, void *data) {
    (void)ssl;
    const struct context *self = data;
    unsigned char *found;
    if (SSL_select_next_proto(&found, size, self->protocols, self->protocols_size, offered, offered_size) !=
        OPENSSL_NPN_NEGOTIATED)
        return SSL_TLSEXT_ERR_NOACK; /* the server sees that none was agreed on, and says so */
    *chosen = found;
    return SSL_TLSEXT_ERR_OK;
}

static int set_protocols(struct context *self, PyObject *names) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); i++) {
        char *name;
        Py_ssize_t size;
        if (PyBytes_AsStringAndSize(PyTuple_GET_ITEM(names, i), &name, &size) < 0)
            return -1;
        if (size < 1 || size > 255) {
            PyErr_SetString(PyExc_ValueError, "the name of a protocol has 1 to 255 bytes");
            return -1;
        }
        unsigned char *grown = PyMem_Realloc(self->protocols, self->protocols_size + 1 + (size_t)size);
        if (!grown) {
            PyErr_NoMemory();
            return -1;
        }
        self->protocols = grown;
        grown[self->protocols_size] = (unsigned char)size;
        memcpy(grown + self->protocols_size + 1, name, (size_t)size);
        self->protocols_size += 1 + (unsigned int)size;
    }
    if (self->server)
        SSL_CTX_set_alpn_select_cb(self->ssl, choose_protocol, self);
    else if (self->protocols_size && SSL_CTX_set_alpn_protos(self->ssl, self->protocols, self->protocols_size) != 0)
        return raise_here();
    return 0;
}

static int set_trust(struct context *self, const char *pem, Py_ssize_t size) {
    BIO *source = BIO_new_mem_buf(pem, (int)size);
    if (!source)
        return raise_here();
    X509_STORE *store = SSL_CTX_get_cert_store(self->ssl);
    int added = 0, failed = 0;
    X509 *certificate;
    while (!failed && (certificate = PEM_read_bio_X509(source, NULL, no_passphrase, NULL))) {
        failed = !X509_STORE_add_cert(store, certificate);
        added++;
        X509_free(certificate);
    }
    BIO_free(source);
    if (failed)
        return raise_here();
    ERR_clear_error(); /* the end of the text is an error there */
    if (!added) {
        PyErr_SetString(PyExc_ValueError, "there is no certificate in the CA's text");
        return -1;
    }
    if (!X509_VERIFY_PARAM_set_flags(SSL_CTX_get0_param(self->ssl), X509_V_FLAG_X509_STRICT))
        return raise_here();
    self->verifies = 1;
    /* A server lets clients without a certificate through the handshake and decides afterwards what they may. */
    SSL_CTX_set_verify(self->ssl, SSL_VERIFY_PEER, NULL);
    return 0;
}

static int fill(struct context *self, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"server", "file", "ca", "protocols", "rekey_after", NULL};
    const char *file = NULL, *ca = NULL;
    Py_ssize_t ca_size = 0;
    PyObject *protocols = NULL;
    self->rekey_after = REKEY_AFTER;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "|$pzz#O!K:Context", names, &self->server, &file, &ca,
                                     &ca_size, &PyTuple_Type, &protocols, &self->rekey_after))
        return -1;
    if (!protocols || !self->rekey_after || ca_size > 1 << 20) {
        PyErr_SetString(PyExc_ValueError,
                        "protocols are named, keys renewed after at least a byte, and a CA has at most 1 MiB");
        return -1;
    }
    ERR_clear_error();
    if (!(self->ssl = SSL_CTX_new(self->server ? TLS_server_method() : TLS_client_method())))
        return raise_here();
    if (!SSL_CTX_set_min_proto_version(self->ssl, TLS1_3_VERSION) ||
        !SSL_CTX_set_max_proto_version(self->ssl, TLS1_3_VERSION) || !SSL_CTX_set_ciphersuites(self->ssl, CIPHERS) ||
        !SSL_CTX_set_num_tickets(self->ssl, 0))
        return raise_here();
    /* No resumption: every connection proves both certificates anew, so a revocation counts at once. The end of the
     * TCP stream is an end: the protocol above has ends of its own. */
    SSL_CTX_set_session_cache_mode(self->ssl, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_options(self->ssl, SSL_OP_NO_TICKET | SSL_OP_NO_COMPRESSION | SSL_OP_IGNORE_UNEXPECTED_EOF |
                                       SSL_OP_CIPHER_SERVER_PREFERENCE);
    SSL_CTX_set_default_passwd_cb(self->ssl, no_passphrase);
    if (file && (SSL_CTX_use_certificate_chain_file(self->ssl, file) != 1 ||
                 SSL_CTX_use_PrivateKey_file(self->ssl, file, SSL_FILETYPE_PEM) != 1 ||
                 SSL_CTX_check_private_key(self->ssl) != 1))
        return raise_here();
    if (ca && set_trust(self, ca, ca_size) < 0)
        return -1;
    return set_protocols(self, protocols);
}

static PyObject *context_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    struct context *self = (struct context *)type->tp_alloc(type, 0);
    if (self && fill(self, arguments, keywords) < 0)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void context_dealloc(struct context *self) {
    PyTypeObject *type = Py_TYPE(self);
    SSL_CTX_free(self->ssl);
    PyMem_Free(self->protocols);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot context_slots[] = {
    {Py_tp_doc, "How sessions are made: trust, certificate, protocol names."},
    {Py_tp_new, context_new},
    {Py_tp_dealloc, context_dealloc},
    {0, NULL},
};
static PyType_Spec context_spec = {
    .name = "transport._tls.Context",
    .basicsize = sizeof(struct context),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = context_slots,
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "transport._tls",
    .m_doc = "TLS 1.3 by OpenSSL, for transport.tls.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__tls(void) {
    PyObject *made = PyModule_Create(&module);
    if (!made)
        return NULL;
    PyObject *session = PyType_FromSpec(&session_spec);
    context_type = (PyTypeObject *)PyType_FromSpec(&context_spec);
    tls_error = PyErr_NewExceptionWithDoc("transport._tls.TlsError", "What OpenSSL refused: (reason, verify code).",
                                          NULL, NULL);
    if (!context_type || !session || !tls_error ||
        PyModule_AddObjectRef(made, "Context", (PyObject *)context_type) < 0 ||
        PyModule_AddObjectRef(made, "Session", session) < 0 || PyModule_AddObjectRef(made, "TlsError", tls_error) < 0 ||
        PyModule_AddStringConstant(made, "OPENSSL", OpenSSL_version(OPENSSL_VERSION)) < 0)
        Py_CLEAR(made);
    Py_XDECREF(session);
    return made;
}
