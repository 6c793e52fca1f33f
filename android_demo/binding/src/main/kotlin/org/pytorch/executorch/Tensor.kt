package org.pytorch.executorch

import com.facebook.jni.HybridData
import java.nio.Buffer
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** A tensor over a direct buffer. The native library reads [shape], [dtypeJniCode] and [getRawDataBuffer] by their names. */
class Tensor private constructor(@JvmField val shape: LongArray, private val data: ByteBuffer, private val dtype: Int) {
    /** Keeps what the native library allocated for a tensor that it returned. */
    @JvmField var mHybridData: HybridData? = null

    fun dtypeJniCode(): Int = dtype

    fun getRawDataBuffer(): Buffer = data

    /** A copy of the elements of a float32 tensor. */
    fun floats(): FloatArray {
        check(dtype == FLOAT) { "the tensor has elements of type $dtype, not float32" }
        val floats = data.duplicate().order(ByteOrder.nativeOrder()).asFloatBuffer()
        return FloatArray(floats.remaining()).also(floats::get)
    }

    /** The elements of a tensor of a type, in the native order; they are the tensor's own memory. */
    fun elements(type: String): ByteBuffer {
        check(dtype == CODES[type]) { "the tensor has elements of type $dtype, not $type" }
        return data.duplicate().order(ByteOrder.nativeOrder())
    }

    companion object {
        private const val INT64 = 4
        private const val FLOAT = 6
        private val CODES = mapOf("uint8" to 0, "int16" to 2, "float16" to 5, "float32" to FLOAT)

        /** An int64 tensor that holds a copy of [values]. */
        fun of(values: LongArray, vararg shape: Long): Tensor {
            val data = ByteBuffer.allocateDirect(values.size * Long.SIZE_BYTES).order(ByteOrder.nativeOrder())
            data.asLongBuffer().put(values)
            return Tensor(shape, data, INT64)
        }

        /** A tensor of a type over a direct buffer of the native order. */
        fun of(data: ByteBuffer, type: String, vararg shape: Long): Tensor = Tensor(shape, data, CODES.getValue(type))

        /** Called by the native library. The buffer is the method's own memory: it holds until the next call. */
        @JvmStatic
        fun nativeNewTensor(data: ByteBuffer, shape: LongArray, dtype: Int, owner: HybridData): Tensor =
            Tensor(shape, data, dtype).also { it.mHybridData = owner }
    }
}
