package dev.lobit.core

/** The members of a JSON object, each of which must be asked for by its name and type; nothing is converted to another type. */
internal class Fields(private val values: Map<*, *>, val place: String, private val age: Age) {
    /** How the minor version that wrote the file compares with the reader's. */
    enum class Age { OLDER, SAME, NEWER }

    private val asked = HashSet<String>()

    private fun wrong(name: String, needed: String): Nothing = throw Wrong("$place: $name is ${shown(values[name])}: $needed is needed")

    fun any(name: String): Any? {
        asked += name
        if (!values.containsKey(name)) throw Wrong("$place lacks $name")
        return values[name]
    }

    fun text(name: String): String = any(name) as? String ?: wrong(name, "a text")

    fun textOrNull(name: String): String? = any(name)?.let { text(name) }

    fun flag(name: String): Boolean = any(name) as? Boolean ?: wrong(name, "true or false")

    /** A whole number that is not negative. */
    fun count(name: String): Long = (any(name) as? Long)?.takeIf { it >= 0 } ?: wrong(name, "a whole number from 0")

    fun countOrNull(name: String): Long? = any(name)?.let { count(name) }

    /** A count that the app holds as Int; larger ones count as the largest Int, which is more than any phone has memory for. */
    fun size(name: String): Int = minOf(count(name), Int.MAX_VALUE.toLong()).toInt()

    fun numberOrNull(name: String): Double? = any(name)?.let { value ->
        val fits = when (value) {
            is Long -> value != Long.MIN_VALUE
            is Double -> value < LARGEST && value > -LARGEST
            else -> false
        }
        if (fits) (value as Number).toDouble() else wrong(name, "a number")
    }

    fun number(name: String): Double = numberOrNull(name) ?: wrong(name, "a number")

    fun <T> list(name: String, read: Fields.(String) -> T): List<T> {
        val found = any(name) as? List<*> ?: wrong(name, "a list")
        val items = found.withIndex().associate { (index, item) -> "$index" to item }
        return Fields(items, "$place: $name", age).run { items.keys.map { read(it) } }
    }

    fun <T> map(name: String, read: Fields.(String) -> T): Map<String, T> {
        val found = any(name) as? Map<*, *> ?: wrong(name, "an object")
        return Fields(found, "$place: $name", age).run { found.keys.associate { "$it" to read("$it") } }
    }

    /** An object with the members that [read] asks for, and no others unless a newer minor version wrote the file. */
    fun <T> fields(name: String, read: Fields.() -> T): T = of(any(name), "$place: $name", age, read)

    /** A member that an older minor version does not have: without it such a file means [missing]. */
    fun <T> later(name: String, missing: T, read: Fields.(String) -> T): T =
        if (age == Age.OLDER && !values.containsKey(name)) missing else read(name)

    /** A value of a plain type, one of those that [fits] takes. */
    fun plain(name: String, needed: String, fits: (Any?) -> Boolean): Any = any(name).takeIf(fits) ?: wrong(name, needed)

    class Wrong(message: String) : Exception(message)

    companion object {
        private const val LARGEST = 9223372036854775808.0

        fun <T> of(value: Any?, place: String, age: Age, read: Fields.() -> T): T {
            val fields = Fields(value as? Map<*, *> ?: throw Wrong("$place is ${shown(value)}: an object is needed"), place, age)
            val made = fields.read()
            val unknown = value.keys - fields.asked
            if (unknown.isNotEmpty() && age != Age.NEWER) throw Wrong("$place has ${shown(unknown.first())}, which is unknown")
            return made
        }

        fun isCount(value: Any?) = value is Long && value >= 0
    }
}
