package dev.lobit.host

import dev.lobit.core.Bundle
import dev.lobit.core.CachedEngine
import dev.lobit.core.Engine
import dev.lobit.core.Half
import dev.lobit.core.Method
import dev.lobit.core.Port
import dev.lobit.core.Program
import dev.lobit.core.elementBytes
import java.io.DataInputStream
import java.io.DataOutputStream
import java.io.File
import java.io.InputStream
import java.io.OutputStream
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** A program that gives recorded outputs and records its inputs: of each call the bytes of all ports in their order. */
private class RecordedProgram(outputs: InputStream, private val record: OutputStream) : Program {
    private val outputs = DataInputStream(outputs)

    override fun run(method: Method, inputs: Map<String, ByteBuffer>): Map<String, ByteBuffer> {
        for (port in method.inputs) record.write(bytesOf(inputs.getValue(port.name)))
        return method.outputs.associate { port -> port.name to recorded(port) }
    }

    private fun bytesOf(buffer: ByteBuffer): ByteArray = ByteArray(buffer.capacity()).also { buffer.duplicate().get(it) }

    private fun recorded(port: Port): ByteBuffer {
        val size = port.shape.fold(port.elementBytes) { product, size -> product * (size as Long).toInt() }
        val bytes = ByteArray(size).also(outputs::readFully)
        return ByteBuffer.allocateDirect(size).order(ByteOrder.nativeOrder()).apply { duplicate().put(bytes) }
    }

    override fun close() {
        outputs.close()
        record.close()
    }
}

/** Lets an engine read the tokens of each call, and begin anew where a call has none; returns the logits of all, one after the other. */
fun called(engine: Engine, calls: List<LongArray>): List<Float> = calls.flatMap { tokens ->
    if (tokens.isEmpty()) {
        engine.reset()
        emptyList()
    } else {
        (if (tokens.size == 1) engine.decode(tokens[0]) else engine.prefill(tokens)).asList()
    }
}

/** Writes floats, big-endian. */
fun writeFloats(file: File, values: List<Float>) =
    DataOutputStream(file.outputStream().buffered()).use { out -> values.forEach(out::writeFloat) }

/** Answers `{"folder": BUNDLE, "outputs": FILE, "inputs": FILE, "logits": FILE, "calls": [[...], ...]}` of Check.kt. */
fun recordedCalls(question: Map<*, *>): String {
    val (folder, outputs, inputs, logits) = listOf("folder", "outputs", "inputs", "logits").map { File(question[it] as String) }
    RecordedProgram(outputs.inputStream().buffered(), inputs.outputStream().buffered()).use { program ->
        val engine = CachedEngine(Bundle(folder, Bundle.manifest(folder)), program)
        engine.use { writeFloats(logits, called(it, tokens(question["calls"] as List<*>))) }
    }
    return "done"
}

private fun tokens(calls: List<*>): List<LongArray> = calls.map { call -> (call as List<*>).map { it as Long }.toLongArray() }

/**
 * Answers `{"floats": FILE, "halves": FILE}` of Check.kt: of every float of a file, big-endian, the nearest half float and its value as a
 * float are written.
 */
fun convertedFloats(question: Map<*, *>): String {
    val floats = ByteBuffer.wrap(File(question["floats"] as String).readBytes()).asFloatBuffer()
    DataOutputStream(File(question["halves"] as String).outputStream().buffered()).use { out ->
        for (index in 0 until floats.limit()) {
            val half = Half.bits(floats.get(index))
            out.writeShort(half.toInt())
            out.writeInt(Half.value(half).toRawBits())
        }
    }
    return "done"
}
