package dev.lobit.core

import java.io.Closeable
import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder

/**
 * A safetensors file, out of which rows of tensors are read one by one.
 *
 * Its header is read at once and is believed in nothing that leaves the file. Throws [LobitException].
 */
internal class SafeTensors(private val path: File) : Closeable {
    /** Rows are what lies along the first axis. */
    inner class Tensor(val type: String, val shape: List<Long>, private val start: Long, size: Long) {
        private val rowBytes = if (shape[0] > 0) (size / shape[0]).toInt() else 0

        /** The bytes of a row, little-endian. */
        fun row(index: Long): ByteBuffer {
            val bytes = ByteArray(rowBytes)
            reading {
                file.seek(start + index * rowBytes)
                file.readFully(bytes)
            }
            return ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN)
        }
    }

    private val file = reading { RandomAccessFile(path, "r") }
    private val tensors: Map<String, Tensor> = try {
        reading(::header)
    } catch (error: LobitException) {
        file.close()
        throw error
    }

    /** A tensor of two axes by its name. */
    fun matrix(name: String, type: String): Tensor {
        val found = tensors[name] ?: damaged("it has no ${shown(name)}")
        val fits = found.type == type && found.shape.size == 2
        if (!fits) damaged("${shown(name)} is ${shown(found.type)} of the shape ${shown(found.shape)}")
        return found
    }

    fun damaged(why: String): Nothing = throw LobitException("${path.name} cannot be used ($why): copy or export the bundle again")

    private fun <T> reading(read: () -> T): T = try {
        read()
    } catch (error: IOException) {
        damaged(error.message ?: "$error")
    }

    private fun header(): Map<String, Tensor> {
        val size = ByteArray(Long.SIZE_BYTES).also(file::readFully).let { ByteBuffer.wrap(it).order(ByteOrder.LITTLE_ENDIAN).long }
        if (size !in 2..minOf(LARGEST_HEADER, file.length() - Long.SIZE_BYTES)) damaged("its header has $size bytes")
        val text = String(ByteArray(size.toInt()).also(file::readFully))
        val found = try {
            Json.parse(text) as? Map<*, *>
        } catch (error: Json.Problem) {
            damaged("its header is not JSON: ${error.message}")
        }
        val names = found.orEmpty().keys.map { "$it" } - "__metadata__"
        return names.associateWith { tensor(it, found?.get(it), Long.SIZE_BYTES + size) }
    }

    private fun tensor(name: String, entry: Any?, data: Long): Tensor {
        val fields = entry as? Map<*, *>
        val type = fields?.get("dtype") as? String
        val shape = (fields?.get("shape") as? List<*>)?.map { (it as? Long)?.takeIf { size -> size >= 0 } ?: -1 }.orEmpty()
        val ends = (fields?.get("data_offsets") as? List<*>)?.takeIf { it.size == 2 }?.map { it as? Long ?: -1 }
        val (start, end) = ends ?: listOf(-1L, -1L)
        val size = shape.fold((BYTES[type] ?: -1).toDouble()) { product, axis -> product * axis }
        val fits = start in 0..end && end <= file.length() - data && size == (end - start).toDouble()
        if (type == null || shape.isEmpty() || -1L in shape || !fits) damaged("${shown(name)} does not lie in it as its header says")
        if (shape[0] > 0 && (end - start) / shape[0] > LARGEST_ROW) damaged("a row of ${shown(name)} has more than $LARGEST_ROW bytes")
        return Tensor(type, shape, data + start, end - start)
    }

    override fun close() = file.close()

    private companion object {
        const val LARGEST_HEADER = 1L shl 20
        const val LARGEST_ROW = 1L shl 24
        val BYTES = mapOf("U8" to 1, "I8" to 1, "F16" to 2, "BF16" to 2, "F32" to 4, "I32" to 4, "I64" to 8)
    }
}
