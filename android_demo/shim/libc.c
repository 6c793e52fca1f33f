/* libc.so for Android's ExecuTorch libraries on Linux: what differs between bionic (Android's C library, 64 bits) and glibc.
 *
 * Symbols that mean the same in both are jumps that lobit/android/shim.py writes. Those below differ: in the layout of FILE, in the size of
 * a signal set or a mutex, in the numbers of constants, or since glibc has no such function. BIONIC(f) defines f as the libraries ask for it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <wchar.h>

#define BIONIC_VERSION(name, version) __asm__(".symver bionic_" #name "," #name "@" #version);
#define BIONIC(name) BIONIC_VERSION(name, LIBC)

int shim_base_marker;

/* stdin, stdout and stderr are entries of an array __sF, 152 bytes each; newer code has pointers of these names instead. */
enum { FILE_BYTES = 152 };
char bionic___sF[3 * FILE_BYTES];
BIONIC(__sF)
FILE *bionic_stdout, *bionic_stderr;
BIONIC(stdout)
BIONIC(stderr)

__attribute__((constructor(101))) static void set_streams(void) {
  bionic_stdout = stdout;
  bionic_stderr = stderr;
}

static FILE *stream(void *file) {
  uintptr_t offset = (uintptr_t)file - (uintptr_t)bionic___sF;
  if (offset >= sizeof bionic___sF) return file;
  return offset < FILE_BYTES ? stdin : offset < 2 * FILE_BYTES ? stdout : stderr;
}

int bionic_fprintf(void *file, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int written = vfprintf(stream(file), format, arguments);
  va_end(arguments);
  return written;
}
BIONIC(fprintf)
int bionic_vfprintf(void *file, const char *format, va_list arguments) { return vfprintf(stream(file), format, arguments); }
BIONIC(vfprintf)
int bionic_fputs(const char *text, void *file) { return fputs(text, stream(file)); }
BIONIC(fputs)
int bionic_fputc(int character, void *file) { return fputc(character, stream(file)); }
BIONIC(fputc)
size_t bionic_fwrite(const void *data, size_t size, size_t count, void *file) { return fwrite(data, size, count, stream(file)); }
BIONIC(fwrite)
int bionic_fflush(void *file) { return fflush(file ? stream(file) : NULL); }
BIONIC(fflush)
int bionic_ferror(void *file) { return ferror(stream(file)); }
BIONIC(ferror)
int bionic_setvbuf(void *file, char *buffer, int mode, size_t size) { return setvbuf(stream(file), buffer, mode, size); }
BIONIC(setvbuf)
int bionic_getc(void *file) { return getc(stream(file)); }
BIONIC(getc)
int bionic_ungetc(int character, void *file) { return ungetc(character, stream(file)); }
BIONIC(ungetc)
wint_t bionic_getwc(void *file) { return getwc(stream(file)); }
BIONIC(getwc)
wint_t bionic_ungetwc(wint_t character, void *file) { return ungetwc(character, stream(file)); }
BIONIC(ungetwc)
wint_t bionic_fputwc(wchar_t character, void *file) { return fputwc(character, stream(file)); }
BIONIC(fputwc)

int *bionic___errno(void) { return &errno; }
BIONIC(__errno)
extern int __xpg_strerror_r(int error, char *buffer, size_t size);
int bionic_strerror_r(int error, char *buffer, size_t size) { return __xpg_strerror_r(error, buffer, size); }
BIONIC(strerror_r)
/* glibc's may return a text of its own and leave the buffer as it is; bionic's callers read the buffer. */
char *bionic___gnu_strerror_r(int error, char *buffer, size_t size) {
  char *text = strerror_r(error, buffer, size);
  if (text != buffer && size) snprintf(buffer, size, "%s", text);
  return buffer;
}
BIONIC(__gnu_strerror_r)
void bionic___assert2(const char *file, int line, const char *function, const char *what) {
  fprintf(stderr, "%s:%d: %s: assertion \"%s\" failed\n", file, line, function, what);
  abort();
}
BIONIC(__assert2)
void bionic_android_set_abort_message(const char *message) { fprintf(stderr, "abort: %s\n", message ? message : ""); }
BIONIC(android_set_abort_message)

/* Checked versions of string functions, which are called with the sizes of the buffers. */
static void check(int fits) {
  if (!fits) {
    fprintf(stderr, "a buffer of the Android library would overflow\n");
    abort();
  }
}
size_t bionic___strlen_chk(const char *text, size_t size) {
  size_t length = strlen(text);
  check(length < size);
  return length;
}
BIONIC(__strlen_chk)
char *bionic___strchr_chk(const char *text, int character, size_t size) {
  check(strnlen(text, size) < size);
  return strchr(text, character);
}
BIONIC(__strchr_chk)
char *bionic___strrchr_chk(const char *text, int character, size_t size) {
  check(strnlen(text, size) < size);
  return strrchr(text, character);
}
BIONIC(__strrchr_chk)
ssize_t bionic___write_chk(int file, const void *data, size_t count, size_t size) {
  check(count <= size);
  return write(file, data, count);
}
BIONIC_VERSION(__write_chk, LIBC_N)
size_t bionic___fwrite_chk(const void *data, size_t item, size_t count, void *file, size_t size) {
  check(item == 0 || count <= size / item);
  return fwrite(data, item, count, stream(file));
}
BIONIC_VERSION(__fwrite_chk, LIBC_N)
char *bionic___strncpy_chk2(char *to, const char *from, size_t count, size_t to_size, size_t from_size) {
  (void)from_size;
  check(count <= to_size);
  return strncpy(to, from, count);
}
BIONIC(__strncpy_chk2)

/* There are no system properties here: each is empty. */
int bionic___system_property_get(const char *name, char *value) {
  (void)name;
  value[0] = 0;
  return 0;
}
BIONIC(__system_property_get)

/* Constants with other numbers. */
long bionic_sysconf(int name) {
  switch (name) {
    case 0x06: return sysconf(_SC_CLK_TCK);
    case 0x27:
    case 0x28: return sysconf(_SC_PAGESIZE);
    case 0x48: return sysconf(_SC_GETPW_R_SIZE_MAX);
    case 0x60: return sysconf(_SC_NPROCESSORS_CONF);
    case 0x61: return sysconf(_SC_NPROCESSORS_ONLN);
    case 0x62: return sysconf(_SC_PHYS_PAGES);
    case 0x63: return sysconf(_SC_AVPHYS_PAGES);
  }
  fprintf(stderr, "sysconf(%#x) of Android is not known here\n", name);
  errno = EINVAL;
  return -1;
}
BIONIC(sysconf)
long bionic_pathconf(const char *path, int name) {
  return pathconf(path, name == 5 ? _PC_PATH_MAX : name == 4 ? _PC_NAME_MAX : name);
}
BIONIC(pathconf)

/* A signal set has 8 bytes in bionic, 128 in glibc; a mutex has 40, and on arm64 48 in glibc, of which the last 8 are not used. */
enum { SIGNALS = sizeof(uint64_t), MUTEX = 40 };
int bionic_sigfillset(uint64_t *set) {
  *set = UINT64_MAX;
  return 0;
}
BIONIC(sigfillset)
int bionic_pthread_sigmask(int how, const uint64_t *set, uint64_t *before) {
  sigset_t wide, wide_before;
  sigemptyset(&wide);
  if (set) memcpy(&wide, set, SIGNALS);
  int result = pthread_sigmask(how, set ? &wide : NULL, &wide_before);
  if (before) memcpy(before, &wide_before, SIGNALS);
  return result;
}
BIONIC(pthread_sigmask)
int bionic_pthread_mutex_init(void *mutex, const pthread_mutexattr_t *attributes) {
  pthread_mutex_t made;
  int result = pthread_mutex_init(&made, attributes);
  if (result == 0) memcpy(mutex, &made, MUTEX);
  return result;
}
BIONIC(pthread_mutex_init)
