/* Opens a library so that its symbols bind to libraries beside it first: the JVM has glibc's C++ library in the global scope, where
 * Android's own would otherwise find std:: and the functions of exceptions.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <jni.h>

JNIEXPORT jstring JNICALL Java_dev_lobit_host_Libraries_open(JNIEnv *env, jclass class, jstring path) {
  (void)class;
  const char *name = (*env)->GetStringUTFChars(env, path, NULL);
  void *library = dlopen(name, RTLD_NOW | RTLD_DEEPBIND);
  const char *error = library ? NULL : dlerror();
  (*env)->ReleaseStringUTFChars(env, path, name);
  return error ? (*env)->NewStringUTF(env, error) : NULL;
}
