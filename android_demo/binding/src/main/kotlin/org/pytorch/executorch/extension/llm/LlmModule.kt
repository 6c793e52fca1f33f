package org.pytorch.executorch.extension.llm

import com.facebook.jni.HybridData
import java.nio.ByteBuffer
import org.pytorch.executorch.ExecutorchRuntimeException

/** Hears what [LlmModule.generate] gives; called on the thread that generates, by the native library. */
interface LlmCallback {
    /** The text of the next token or tokens. */
    fun onResult(result: String)

    /** ExecuTorch's own statistics as JSON, at the end. */
    fun onStats(stats: String) {}

    fun onError(errorCode: Int, message: String) {}
}

/** A text model with its tokenizer. What it has read stays in its cache from call to call, until [reset]. */
class LlmModule(program: String, tokenizer: String, temperature: Float) : AutoCloseable {
    private val mHybridData: HybridData = initHybrid(TEXT, program, tokenizer, temperature, ArrayList(), 0, 0, MAPPED)

    fun load() = check(loadNative(), "the program cannot be loaded")

    /**
     * Reads [prompt] after what was read before, and generates until a stop token or [length] tokens in all, prompt included.
     *
     * A token that should begin the text is a part of [prompt]: the tokenizer adds none.
     */
    fun generate(prompt: String, length: Int, temperature: Float, callback: LlmCallback) =
        check(generateNative(prompt, length, callback, false, temperature, 0, 0), "generating failed")

    /** Ends a call of [generate] after its current token; may be called from any thread. */
    fun stop() = stopNative()

    fun reset() = resetContextNative()

    override fun close() = mHybridData.resetNative()

    private fun check(error: Int, what: String) {
        if (error != 0) throw ExecutorchRuntimeException(error, what)
    }

    private external fun generateNative(
        prompt: String, length: Int, callback: LlmCallback, echo: Boolean, temperature: Float, begins: Int, ends: Int,
    ): Int

    private external fun stopNative()

    private external fun loadNative(): Int

    private external fun resetContextNative()

    private external fun prefillTextInput(prompt: String): Int

    private external fun prefillImagesInput(image: IntArray, width: Int, height: Int, channels: Int): Int

    private external fun prefillImagesInputBuffer(image: ByteBuffer, width: Int, height: Int, channels: Int): Int

    private external fun prefillNormalizedImagesInput(image: FloatArray, width: Int, height: Int, channels: Int): Int

    private external fun prefillNormalizedImagesInputBuffer(image: ByteBuffer, width: Int, height: Int, channels: Int): Int

    private external fun prefillAudioInput(audio: ByteArray, batch: Int, bins: Int, frames: Int): Int

    private external fun prefillAudioInputFloat(audio: FloatArray, batch: Int, bins: Int, frames: Int): Int

    private external fun prefillRawAudioInput(audio: ByteArray, batch: Int, channels: Int, samples: Int): Int

    companion object {
        private const val TEXT = 1
        private const val MAPPED = 1

        @JvmStatic
        private external fun initHybrid(
            kind: Int, program: String, tokenizer: String, temperature: Float, data: List<String>, begins: Int, ends: Int, loadMode: Int,
        ): HybridData
    }
}
