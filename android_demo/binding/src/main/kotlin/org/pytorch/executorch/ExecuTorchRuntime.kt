package org.pytorch.executorch

/** What the native library has. */
class ExecuTorchRuntime private constructor() {
    companion object {
        /** Names of the operators that programs may use outside of a backend. */
        @JvmStatic external fun getRegisteredOps(): Array<String>

        /** Names of the backends, such as `XnnpackBackend`. */
        @JvmStatic external fun getRegisteredBackends(): Array<String>
    }
}

/** An error of the native library; [code] is ExecuTorch's own number of it. */
class ExecutorchRuntimeException(val code: Int, details: String) : RuntimeException("ExecuTorch error 0x%x: %s".format(code, details)) {
    companion object {
        /** Called by the native library, which throws what it returns. */
        @JvmStatic
        fun makeExecutorchException(code: Int, details: String): RuntimeException = ExecutorchRuntimeException(code, details)
    }
}
