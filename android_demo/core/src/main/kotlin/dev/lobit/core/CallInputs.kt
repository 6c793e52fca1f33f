package dev.lobit.core

import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.cos
import kotlin.math.sin

/** Bytes of an element of a port; 0 where this app has no ports of its type. */
val Port.elementBytes: Int get() = when (dtype) {
    "float32" -> Float.SIZE_BYTES
    "float16", "int16" -> Short.SIZE_BYTES
    "uint8" -> Byte.SIZE_BYTES
    else -> 0
}

/** Whether a port has floats, of 16 or 32 bits. */
internal val Port.isFloat: Boolean get() = dtype == "float16" || dtype == "float32"

/** A new buffer for all elements of a port. Throws [LobitException] where it has another type, or a changing shape. */
internal fun Port.buffer(usable: Boolean = elementBytes > 0): ByteBuffer {
    val bytes = shape.fold(elementBytes.toDouble()) { product, size -> product * (size as? Long ?: 0) }
    if (!usable || bytes < 1 || bytes > LARGEST_PORT) {
        wrong("the program's port ${shown(name)} is $dtype of the shape ${shown(shape)}, which this app does not know")
    }
    return ByteBuffer.allocateDirect(bytes.toInt()).order(ByteOrder.nativeOrder())
}

/** Refuses a port of another shape. */
internal fun Port.checkShape(needed: List<Long>) {
    if (shape != needed) wrong("the program's port ${shown(name)} has the shape ${shown(shape)}, not $needed")
}

/** Refuses a bundle whose program this app cannot call. */
internal fun wrong(what: String): Nothing = throw LobitException("$what: export the bundle with this app's lobit")

private const val LARGEST_PORT = 1 shl 30

/** The elements of a port of floats, which lie in [buffer] as half floats or as they are. */
internal class Floats(port: Port, private val buffer: ByteBuffer) {
    private val half = port.dtype == "float16"

    /** Number of elements. */
    val size = buffer.capacity() / port.elementBytes

    operator fun get(index: Int): Float =
        if (half) Half.value(buffer.getShort(index * Short.SIZE_BYTES)) else buffer.getFloat(index * Float.SIZE_BYTES)

    operator fun set(index: Int, value: Float) {
        if (half) buffer.putShort(index * Short.SIZE_BYTES, Half.bits(value)) else buffer.putFloat(index * Float.SIZE_BYTES, value)
    }
}

/** The inputs of one method that the client computes, in buffers that every call fills anew (lobit's `runtime/client.py`). */
internal class CallInputs(private val method: Method, private val client: ClientInputs, private val table: EmbeddingTable) {
    private val ports = method.inputs.associateBy { it.name }
    private val fillers = ArrayList<(LongArray, Int) -> Unit>()

    /** The inputs by the names of their ports. */
    val buffers = LinkedHashMap<String, ByteBuffer>()

    /** Number of tokens that the method has room for. */
    val room: Int

    init {
        val embedding = client.embedding.port
        val size = ports[embedding]?.shape?.getOrNull(1) as? Long ?: wrong("method ${method.name} has no ${shown(embedding)}")
        room = minOf(size, Int.MAX_VALUE.toLong()).toInt()
        add(embedding, listOf(1, size, table.width.toLong())) { out, tokens, _ -> embed(out, tokens) }
        for (rotary in client.rotary) {
            val shape = listOf(1, size, 1, rotary.frequencies.size.toLong())
            add(rotary.cos, shape) { out, _, position -> turn(out, rotary, position, ::cos) }
            add(rotary.sin, shape) { out, _, position -> turn(out, rotary, position, ::sin) }
        }
        for (mask in client.masks) {
            val keys = ports[mask.port]?.shape?.getOrNull(3) as? Long ?: size
            add(mask.port, listOf(1, 1, size, maxOf(keys, size))) { out, _, position -> hide(out, mask, keys.toInt() - room, position) }
        }
        client.last?.let { last -> add(last, listOf(1, 1, size)) { out, tokens, _ -> choose(out, tokens.size - 1) } }
    }

    private fun add(name: String, shape: List<Long>, fill: (Floats, LongArray, Int) -> Unit) {
        val port = ports[name] ?: return
        port.checkShape(shape)
        val floats = Floats(port, port.buffer(port.isFloat).also { buffers[name] = it })
        fillers += { tokens, position -> fill(floats, tokens, position) }
    }

    /** Computes all inputs of a call that reads tokens, at most [room], of which the first is at a position. */
    fun fill(tokens: LongArray, position: Int) = fillers.forEach { it(tokens, position) }

    private fun embed(out: Floats, tokens: LongArray) {
        val width = table.width
        tokens.forEachIndexed { index, token ->
            table.row(token).forEachIndexed { column, value -> out[index * width + column] = value }
        }
        for (index in tokens.size * width until room * width) out[index] = 0f
    }

    private fun turn(out: Floats, rotary: Rotary, position: Int, function: (Double) -> Double) {
        val factor = rotary.factor.toFloat()
        val pairs = rotary.frequencies.size
        for (index in 0 until room * pairs) {
            val angle = (position + index / pairs).toFloat() * rotary.frequencies[index % pairs].toFloat()
            out[index] = function(angle.toDouble()).toFloat() * factor
        }
    }

    /** Slot j holds the latest position before the call that is j modulo the number of slots, and nothing where there is none. */
    private fun hide(out: Floats, mask: Mask, slots: Int, position: Int) {
        val hidden = mask.hidden.toFloat()
        val held = IntArray(slots) { position - 1 - Math.floorMod(position - 1 - it, slots) }
        val keys = held + IntArray(room) { position + it }
        var at = 0
        for (query in position until position + room) {
            for (key in keys) {
                val distance = query - key
                val seen = key >= 0 && distance >= 0 && (mask.window == null || distance < mask.window)
                out[at++] = if (seen) 0f else hidden
            }
        }
    }

    private fun choose(out: Floats, last: Int) {
        for (index in 0 until room) out[index] = if (index == last) 1f else 0f
    }
}
