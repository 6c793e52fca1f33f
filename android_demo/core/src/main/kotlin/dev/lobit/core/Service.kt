package dev.lobit.core

import java.io.DataInputStream
import java.io.DataOutputStream
import java.io.EOFException
import java.io.InputStream
import java.io.OutputStream
import java.nio.ByteBuffer
import org.json.JSONObject

/**
 * Lets another process use an engine, over any pair of streams: `lobit` on a computer talks to a phone, or to an emulated one, in this way.
 * The engine is made when it is first asked for.
 *
 * Both sides send frames: a kind (int8), the number of bytes that follow (int32), and these. All numbers are big-endian. The first frame is
 * the service's: [DONE] with JSON that says what it runs on. Each request then gets one answer, [DONE] or [FAILED]:
 *
 * - [STEP]: position of the first token (int64), then tokens (int64 each). Answer: float32 logits of [Engine.step].
 * - [BENCH]: JSON of a [BenchRequest]. Answer: JSON of the result; before it, a frame [PROGRESS] with JSON for each row that begins.
 *
 * [FAILED] has a message in UTF-8; the next request may follow. The end of the input ends the service.
 */
class Service(
    engine: Lazy<Engine>,
    private val about: JSONObject,
    private val bench: (JSONObject, (JSONObject) -> Unit) -> JSONObject,
) {
    private val engine by engine

    fun run(input: InputStream, output: OutputStream) {
        val requests = DataInputStream(input.buffered())
        val answers = DataOutputStream(output.buffered())
        answers.frame(DONE, about.toString().toByteArray())
        while (true) {
            val kind = try { requests.readByte().toInt() } catch (_: EOFException) { return }
            val size = requests.readInt()
            if (size !in 0..LARGEST_REQUEST) return answers.frame(FAILED, "a request of $size bytes is not read".toByteArray())
            val content = ByteArray(size).also(requests::readFully)
            try {
                answers.frame(DONE, answer(kind, content) { answers.frame(PROGRESS, it.toString().toByteArray()) })
            } catch (error: Exception) {
                answers.frame(FAILED, (error.message ?: "$error").toByteArray())
            }
        }
    }

    private fun answer(kind: Int, content: ByteArray, progress: (JSONObject) -> Unit): ByteArray = when (kind) {
        STEP -> {
            val numbers = ByteBuffer.wrap(content).asLongBuffer()
            val position = numbers.get()
            bytes(engine.step(LongArray(numbers.remaining()).also { numbers.get(it) }, position))
        }
        BENCH -> bench(JSONObject(String(content)), progress).toString().toByteArray()
        else -> throw LobitException("requests of kind $kind are not known: lobit and the app are of different versions")
    }

    private fun bytes(floats: FloatArray): ByteArray {
        val buffer = ByteBuffer.allocate(floats.size * Float.SIZE_BYTES)
        buffer.asFloatBuffer().put(floats)
        return buffer.array()
    }

    companion object {
        const val DONE = 0
        const val FAILED = 1
        const val PROGRESS = 2
        const val STEP = 1
        const val BENCH = 2

        /** Bytes of a request; the tokens of the longest contexts fit. */
        private const val LARGEST_REQUEST = 1 shl 26

        /** Sends one frame. */
        fun DataOutputStream.frame(kind: Int, content: ByteArray) {
            writeByte(kind)
            writeInt(content.size)
            write(content)
            flush()
        }
    }
}
