package dev.lobit.core

import java.math.BigInteger

/**
 * JSON as Python's `json` reads it: no texts without quotes, nothing after the value, numbers of the kind that they are written as.
 *
 * Values are Map (the last of equal names counts), List, String, Long, BigInteger, Double, Boolean and null. `org.json` is not used,
 * because Android's and the JVM's accept different texts, so that tests on one would say nothing about the other.
 */
object Json {
    class Problem(message: String) : Exception(message)

    /** Throws [Problem]. */
    fun parse(text: String): Any? = JsonReader(text).whole()
}

private class JsonReader(private val text: String) {
    private var at = 0
    private var depth = 0

    fun whole(): Any? {
        val value = value()
        if (at < text.length) wrong("more text after the value")
        return value
    }

    private fun wrong(what: String): Nothing = throw Json.Problem("$what at character $at")

    private fun space() {
        while (at < text.length && text[at] in " \t\n\r") at++
    }

    private fun take(word: String): Boolean = text.startsWith(word, at).also { if (it) at += word.length }

    private fun value(): Any? {
        if (++depth > DEEPEST) wrong("more than $DEEPEST levels")
        space()
        val found = when {
            take("{") -> members()
            take("[") -> items()
            take("\"") -> string()
            take("null") -> null
            take("true") -> true
            take("false") -> false
            take("NaN") -> Double.NaN
            take("Infinity") -> Double.POSITIVE_INFINITY
            take("-Infinity") -> Double.NEGATIVE_INFINITY
            else -> number()
        }
        space()
        depth--
        return found
    }

    private fun members(): Map<String, Any?> {
        val found = LinkedHashMap<String, Any?>()
        space()
        if (take("}")) return found
        do {
            space()
            if (!take("\"")) wrong("no name")
            val name = string()
            space()
            if (!take(":")) wrong("no colon")
            found[name] = value()
        } while (take(","))
        if (!take("}")) wrong("no end of an object")
        return found
    }

    private fun items(): List<Any?> {
        val found = ArrayList<Any?>()
        space()
        if (take("]")) return found
        do found += value() while (take(","))
        if (!take("]")) wrong("no end of a list")
        return found
    }

    private fun string(): String {
        val found = StringBuilder()
        while (true) {
            val letter = text.getOrNull(at++) ?: wrong("no end of a text")
            when {
                letter == '"' -> return found.toString()
                letter < ' ' -> wrong("a control character in a text")
                letter == '\\' -> found.append(escaped())
                else -> found.append(letter)
            }
        }
    }

    private fun escaped(): Char = when (val letter = text.getOrNull(at++)) {
        '"', '\\', '/' -> letter
        'b' -> '\b'
        'f' -> '\u000c'
        'n' -> '\n'
        'r' -> '\r'
        't' -> '\t'
        'u' -> {
            val digits = text.substring(at, minOf(at + 4, text.length))
            at += digits.length
            if (digits.length < 4 || digits.any { it !in HEXADECIMAL }) wrong("an unknown escape")
            digits.toInt(16).toChar()
        }
        else -> wrong("an unknown escape")
    }

    private fun digits(): Int {
        val start = at
        while (at < text.length && text[at] in '0'..'9') at++
        return at - start
    }

    private fun number(): Number {
        val start = at
        take("-")
        if (!take("0") && digits() == 0) wrong("no value")
        val end = at
        val fraction = take(".") && (digits() > 0 || wrong("no digits"))
        if (take("e") || take("E")) {
            if (!take("+")) take("-")
            if (digits() == 0) wrong("no digits")
        } else if (!fraction) {
            if (end - start > LONGEST_NUMBER) wrong("a number of ${end - start} digits")
            return text.substring(start, at).let { it.toLongOrNull() ?: BigInteger(it) }
        }
        return text.substring(start, at).toDouble()
    }

    private companion object {
        const val DEEPEST = 500
        const val LONGEST_NUMBER = 4300
        const val HEXADECIMAL = "0123456789abcdefABCDEF"
    }
}
