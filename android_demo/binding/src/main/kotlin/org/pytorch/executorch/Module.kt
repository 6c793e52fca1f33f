package org.pytorch.executorch

import com.facebook.jni.HybridData

/**
 * A program (`.pte`), loaded by [path], whose weights are mapped from the file.
 *
 * [threads]: size of the thread pool; 0: half of the cores. Throws [ExecutorchRuntimeException] where the file is no program of this
 * release.
 */
class Module(path: String, threads: Int = 0) : AutoCloseable {
    private val mHybridData: HybridData = initHybrid(path, MAPPED, threads)

    /** Prepares a method, which packs its weights; without this its first run does. */
    fun load(method: String) {
        val error = loadMethodNative(method)
        if (error != 0) throw ExecutorchRuntimeException(error, "method $method cannot be loaded")
    }

    /** Runs a method; the tensors that it returns hold until the next call. */
    fun execute(method: String, vararg arguments: EValue): Array<EValue> = executeNative(method, arrayOf(*arguments))

    fun methods(): List<String> = getMethodsNative().toList()

    override fun close() = mHybridData.resetNative()

    private external fun executeNative(method: String, arguments: Array<EValue>): Array<EValue>

    private external fun loadMethodNative(method: String): Int

    private external fun readLogBufferNative(): Array<String>

    private external fun etdumpNative(): Boolean

    private external fun etdumpToNative(path: String): Boolean

    private external fun getMethodsNative(): Array<String>

    private external fun getUsedBackends(method: String): Array<String>

    companion object {
        private const val MAPPED = 1

        @JvmStatic private external fun initHybrid(path: String, loadMode: Int, threads: Int): HybridData

        @JvmStatic external fun readLogBufferStaticNative(): Array<String>
    }
}
