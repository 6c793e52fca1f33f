package dev.lobit.demo

import dev.lobit.core.BenchRequest
import dev.lobit.core.Counts
import dev.lobit.core.Message
import org.json.JSONObject

/** How the user wants answers. */
data class Settings(val temperature: Float = 0f, val length: Int = 256, val system: String = "")

/** Something that takes time: [what] as a sentence, the share that is done where it is known, and the job that it is a part of. */
data class Work(val what: String, val share: Float? = null, val job: Job)

/** A benchmark: what was asked, how far it is, and its result. */
data class BenchState(val name: String, val request: BenchRequest, val running: Boolean, val result: JSONObject? = null)

/** All that the screens show. [Store] alone makes new ones. */
data class State(
    val entries: List<Entry> = emptyList(),
    /** Name of the bundle that is loaded for a conversation, or is being loaded. */
    val open: String? = null,
    val work: Work? = null,
    /** Whether an answer is being written; the last message is then the answer so far. */
    val answering: Boolean = false,
    val messages: List<Message> = emptyList(),
    /** Whether turns are turns of a chat; otherwise texts are continued. */
    val chats: Boolean = true,
    val counts: Counts? = null,
    /** A sentence about what went wrong. */
    val problem: String? = null,
    val settings: Settings = Settings(),
    val bench: BenchState? = null,
)
