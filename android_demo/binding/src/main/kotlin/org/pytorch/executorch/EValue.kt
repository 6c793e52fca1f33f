package org.pytorch.executorch

/** An argument or result of a method. The native library makes them by [from] and reads [mTypeCode], then one of the `to` functions. */
class EValue private constructor(@JvmField val mTypeCode: Int, private val value: Any) {
    fun toTensor(): Tensor = value as Tensor

    fun toStr(): String = value as String

    fun toDouble(): Double = value as Double

    fun toInt(): Long = value as Long

    fun toBool(): Boolean = value as Boolean

    companion object {
        @JvmStatic fun from(tensor: Tensor) = EValue(1, tensor)

        @JvmStatic fun from(text: String) = EValue(2, text)

        @JvmStatic fun from(number: Double) = EValue(3, number)

        @JvmStatic fun from(number: Long) = EValue(4, number)

        @JvmStatic fun from(truth: Boolean) = EValue(5, truth)
    }
}
