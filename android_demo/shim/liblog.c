/* liblog.so: Android's log goes to stderr from the priority in LOBIT_ANDROID_LOG on (2: all, 6: errors); without it only errors do. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

enum { ERROR = 6 };

int __android_log_vprint(int priority, const char *tag, const char *format, va_list arguments) {
  const char *told = getenv("LOBIT_ANDROID_LOG");
  if (priority < (told ? atoi(told) : ERROR)) return 0;
  char text[4096];
  vsnprintf(text, sizeof text, format, arguments);
  return fprintf(stderr, "%s: %s\n", tag ? tag : "", text);
}

int __android_log_print(int priority, const char *tag, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int written = __android_log_vprint(priority, tag, format, arguments);
  va_end(arguments);
  return written;
}

int __android_log_write(int priority, const char *tag, const char *text) { return __android_log_print(priority, tag, "%s", text); }

void __android_log_assert(const char *condition, const char *tag, const char *format, ...) {
  fprintf(stderr, "%s: assertion %s failed: ", tag ? tag : "", condition ? condition : "");
  if (format) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
  }
  fputc('\n', stderr);
  abort();
}
