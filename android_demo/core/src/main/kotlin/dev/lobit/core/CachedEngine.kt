package dev.lobit.core

import java.io.File
import java.nio.ByteBuffer

/** A program whose methods take and give tensors of fixed shapes. */
interface Program : AutoCloseable {
    /**
     * Runs a method on a buffer for each of its inputs; returns one for each of its outputs, by the names of the ports.
     *
     * Buffers are direct, have the native order and hold all elements of their port; those that are returned hold until the next call.
     */
    fun run(method: Method, inputs: Map<String, ByteBuffer>): Map<String, ByteBuffer>
}

/**
 * [Engine] over a program with methods `prefill` and `decode` of fixed shapes, for which the client computes the inputs and keeps the
 * caches, as lobit's `runtime/client.py` does.
 *
 * The engine closes [program]. Throws [LobitException] where the bundle's parts do not fit together; the program is then the caller's.
 */
class CachedEngine(bundle: Bundle, private val program: Program) : ChunkedEngine(bundle.manifest.context, bundle.manifest.chunk) {
    private val manifest = bundle.manifest
    private val table: EmbeddingTable
    private val caches: List<Cache>
    private val decode: Call
    private val prefill: Call?

    init {
        val client = manifest.client ?: wrong("bundle ${manifest.name} says nothing about its client's inputs")
        table = EmbeddingTable(File(bundle.folder, client.embedding.file), client.embedding)
        try {
            caches = manifest.states.map { Cache(it, portOf(it.input)) }
            decode = Call(manifest.method("decode"), client)
            prefill = if (chunk > 1) Call(manifest.method("prefill"), client) else null
        } catch (error: LobitException) {
            table.close()
            throw error
        }
    }

    override fun prefill(tokens: LongArray): FloatArray {
        val logits = super.prefill(tokens)
        return logits.copyOfRange(logits.size - manifest.model.vocabSize.toInt(), logits.size)
    }

    override fun step(tokens: LongArray, position: Long): FloatArray {
        val call = prefill?.takeIf { tokens.size != 1 } ?: decode
        require(tokens.size in 1..minOf(chunk, call.inputs.room)) { "a call reads 1 to $chunk tokens, not ${tokens.size}" }
        require(position in 0..context - tokens.size.toLong()) { "position $position is outside of the context of $context" }
        tokens.find { it !in 0 until table.size }?.let { throw IllegalArgumentException("token $it is outside of the vocabulary") }
        call.inputs.fill(tokens, position.toInt())
        val outputs = program.run(call.method, call.buffers)
        for (cache in caches) cache.keep(outputs.getValue(cache.state.output), call.inputs.room, position, tokens.size)
        val logits = Floats(call.logits, outputs.getValue(call.logits.name))
        val vocabulary = manifest.model.vocabSize.toInt()
        return FloatArray(minOf(logits.size / vocabulary, tokens.size) * vocabulary) { logits[it] }
    }

    override fun close() {
        table.close()
        program.close()
    }

    private fun portOf(input: String) = manifest.methods.flatMap { it.inputs }.first { it.name == input }

    /** A method with the buffers of all its inputs. */
    private inner class Call(val method: Method, client: ClientInputs) {
        val inputs = CallInputs(method, client, table)
        val logits = method.outputs.find { it.role == "logits" && it.isFloat } ?: wrong("method ${method.name} has no logits")
        val buffers = inputs.buffers + caches.associate { it.state.input to it.buffer }

        init {
            val room = inputs.room.toLong()
            val vocabulary = manifest.model.vocabSize
            logits.checkShape(listOf(1, if (logits.shape.getOrNull(1) == room) room else 1, vocabulary))
            for (cache in caches) {
                cache.check(port(method.inputs, cache.state.input), cache.state.shape)
                cache.check(port(method.outputs, cache.state.output), cache.rowsShape(room))
            }
            for (port in method.inputs) if (port.name !in buffers) wrong("the program's input ${shown(port.name)} is not explained")
        }

        private fun port(ports: List<Port>, name: String) =
            ports.find { it.name == name } ?: wrong("method ${method.name} has no port ${shown(name)}")
    }
}

/** A state that has all positions' entries on one axis, of which the program puts out the call's own. */
private class Cache(val state: State, port: Port) {
    val buffer: ByteBuffer = port.buffer()
    private val dtype = port.dtype
    private val axis = state.axis?.toInt().takeIf { state.rows && !state.inPlace }
        ?: wrong("this app keeps no state as ${shown(state.input)}")
    private val slots = state.shape[axis].toInt()
    private val outer = state.shape.take(axis).fold(1L, Long::times).toInt()
    private val inner = state.shape.drop(axis + 1).fold(port.elementBytes.toLong(), Long::times).toInt()

    /** Refuses a port that has not the cache's own type, or another shape than is needed. */
    fun check(port: Port, shape: List<Long>) {
        port.checkShape(shape)
        if (port.dtype != dtype) wrong("the program's port ${shown(port.name)} is ${port.dtype}, not $dtype")
    }

    fun rowsShape(room: Long) = state.shape.mapIndexed { index, size -> if (index == axis) room else size }

    /** Writes the entries of a call's tokens; of those that fall into one slot the last one stays. */
    fun keep(rows: ByteBuffer, room: Int, position: Long, count: Int) {
        val source = rows.duplicate()
        val target = buffer.duplicate()
        for (block in 0 until outer) {
            for (index in maxOf(0, count - slots) until count) {
                val to = (block * slots + ((position + index) % slots).toInt()) * inner
                val from = (block * room + index) * inner
                source.limit(from + inner).position(from)
                target.position(to)
                target.put(source)
            }
        }
    }
}
