package dev.lobit.core

/** Half floats (IEEE 754 binary16) as their 16 bits: the JVM lacks Android's class for them, and Android lacks the JVM's functions. */
object Half {
    private const val SIGN = 0x8000
    private const val INFINITE = 0x7c00
    private const val SUBNORMAL_UNIT = 5.9604645E-8f // 2^-24

    /** The half float nearest to a float, the even one of two that are as near. */
    fun bits(value: Float): Short {
        val bits = value.toRawBits()
        val size = bits and Int.MAX_VALUE
        val exponent = size ushr 23
        val half = when {
            size > 0x7f800000 -> INFINITE or maxOf(size and 0x7fffff ushr 13, 1) // not a number
            exponent >= 143 -> INFINITE // from 65536 on
            exponent >= 113 -> rounded(size - (112 shl 23), 13) // a carry goes into the exponent, and from 65520 on to infinity
            exponent >= 102 -> rounded(size and 0x7fffff or 0x800000, 126 - exponent)
            else -> 0
        }
        return (bits ushr 16 and SIGN or half).toShort()
    }

    /** [value] without its lowest bits, rounded. */
    private fun rounded(value: Int, bits: Int): Int {
        val floor = value ushr bits
        val rest = value and (1 shl bits) - 1
        val middle = 1 shl bits - 1
        return if (rest > middle || (rest == middle && floor and 1 == 1)) floor + 1 else floor
    }

    /** The float that is exactly a half float. */
    fun value(bits: Short): Float {
        val sign = bits.toInt() and SIGN shl 16
        val exponent = bits.toInt() ushr 10 and 31
        val fraction = bits.toInt() and 0x3ff
        val size = when (exponent) {
            0 -> (fraction * SUBNORMAL_UNIT).toRawBits()
            31 -> 0x7f800000 or (fraction shl 13)
            else -> exponent + 112 shl 23 or (fraction shl 13)
        }
        return Float.fromBits(sign or size)
    }
}
