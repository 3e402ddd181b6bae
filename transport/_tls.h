/* TLS 1.3 by OpenSSL, for transport/tls.py: the parts of the extension module transport._tls. */
#ifndef TRANSPORT_TLS_H
#define TRANSPORT_TLS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <openssl/ssl.h>

/* How sessions are made: trust, certificate, protocol names. Never changed after it is made. */
struct context {
    PyObject_HEAD
    SSL_CTX *ssl;
    int server;
    int verifies;
    unsigned char *protocols; /* as the ALPN extension has them: each behind its length */
    unsigned int protocols_size;
    unsigned long long rekey_after;
};

/* What OpenSSL said; taken in the thread that called it, raised when the interpreter's lock is held again. */
struct failure {
    unsigned long code; /* of OpenSSL's error queue, 0: none */
    long verify_code;   /* X509_V_ERR_...; X509_V_OK: not about a certificate */
    int error_number;   /* errno of the socket, 0: none */
};

extern PyObject *tls_error;
extern PyTypeObject *context_type;
extern PyType_Spec session_spec;

void failure_take(struct failure *failure, SSL *ssl);
PyObject *failure_raise(const struct failure *failure);

#endif
