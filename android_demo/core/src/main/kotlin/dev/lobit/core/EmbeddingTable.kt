package dev.lobit.core

import java.io.Closeable
import java.io.File
import java.nio.ByteBuffer

/** A bundle's table of embeddings, stored as the manifest says in [Lookup]. Throws [LobitException] where the file is another. */
internal class EmbeddingTable(path: File, private val told: Lookup) : Closeable {
    private val file = SafeTensors(path)
    private val weight: SafeTensors.Tensor
    private val scale: SafeTensors.Tensor?

    /** Number of tokens, and of entries for each. */
    val size: Long get() = weight.shape[0]
    val width: Int get() = weight.shape[1].toInt() * if (told.bits == 4L) 2 else 1

    init {
        try {
            weight = file.matrix("weight", TYPES.getValue(told.bits))
            scale = if (told.bits < 16) file.matrix("scale", "F32") else null
            val groups = scale?.shape?.get(1) ?: 1
            if (width < 1 || groups < 1 || width % groups != 0L) file.damaged("rows of $width entries have $groups scales")
            if (scale != null && scale.shape[0] != size) file.damaged("$size tokens have scales for ${scale.shape[0]}")
        } catch (error: LobitException) {
            file.close()
            throw error
        }
    }

    /** The embedding of a token. All products are rounded to float32, as in lobit's `runtime/client.py`. */
    fun row(token: Long): FloatArray {
        val stored = weight.row(token)
        val factor = told.factor.toFloat()
        val scales = scale?.row(token)?.asFloatBuffer() ?: return FloatArray(width) { float(stored, it) * factor }
        val group = width / scales.limit()
        return FloatArray(width) { integer(stored, it).toFloat() * scales.get(it / group) * factor }
    }

    private fun float(stored: ByteBuffer, index: Int): Float =
        if (told.bits == 16L) Half.value(stored.getShort(Short.SIZE_BYTES * index)) else stored.getFloat(Float.SIZE_BYTES * index)

    private fun integer(stored: ByteBuffer, index: Int): Int =
        if (told.bits == 8L) stored.get(index).toInt() else (stored.get(index / 2).toInt() shr 4 * (index % 2) and 15) - 8

    override fun close() = file.close()

    private companion object {
        val TYPES = mapOf(4L to "U8", 8L to "I8", 16L to "F16", 32L to "F32")
    }
}
