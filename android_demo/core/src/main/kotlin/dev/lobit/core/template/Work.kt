package dev.lobit.core.template

/** Counts what a template does and ends it where that is too much: a template comes with a model and is not trusted. */
internal class Work {
    private var steps = 0L

    fun step(count: Long = 1) {
        steps += count
        if (steps > MOST_STEPS) broken("more than $MOST_STEPS steps")
    }

    /** To be called before a text of so many characters is made. */
    fun text(length: Long) {
        if (length > LARGEST_TEXT) broken("a text of more than $LARGEST_TEXT characters")
        step(length / CHARACTERS_A_STEP)
    }

    /** To be called before a list of so many items is made. */
    fun items(count: Long) {
        if (count > LARGEST_LIST) broken("a list of more than $LARGEST_LIST items")
        step(count)
    }

    companion object {
        /** About a second of a phone's processor. */
        const val MOST_STEPS = 1L shl 24

        /** Characters that a conversation may have, or any text on the way to it. */
        const val LARGEST_TEXT = 1L shl 24
        private const val LARGEST_LIST = 1L shl 20

        /** With [MOST_STEPS] it bounds the memory of all texts together. */
        private const val CHARACTERS_A_STEP = 4
    }
}
