/* Loaded first on arm64. Android's compiler reads a constant that guards the stack at 40 bytes after the thread pointer; under glibc the
 * variables of threads lie there. This library claims these bytes, so that they keep their value.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

__thread char stack_guard[128] __attribute__((aligned(16), tls_model("initial-exec"))) = {1};

__attribute__((constructor)) static void check(void) {
  uintptr_t guard = (uintptr_t)__builtin_thread_pointer() + 0x28, ours = (uintptr_t)stack_guard;
  if (guard < ours || guard + 8 > ours + sizeof stack_guard) {
    fprintf(stderr, "the stack guard of Android's code is not where it is expected\n");
    abort();
  }
}
