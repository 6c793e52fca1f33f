package dev.lobit.demo

import android.content.ContentResolver
import android.net.Uri
import dev.lobit.core.Bench
import dev.lobit.core.BenchRequest
import dev.lobit.core.Conversation
import dev.lobit.core.LobitException
import dev.lobit.core.Message
import dev.lobit.core.Probe
import dev.lobit.core.Runtime
import dev.lobit.core.TextEngine
import java.util.concurrent.Executor

/**
 * The app's state in one place, which outlives screens: a rotation in the middle of an answer changes nothing.
 *
 * Actions are called on the main thread and return at once; models are loaded and run on [background], one thing at a time. [main] runs
 * code on the main thread.
 */
class Store(
    private val runtime: () -> Runtime,
    private val library: Library,
    private val probe: Probe,
    private val texts: Texts,
    private val background: Executor,
    private val main: (() -> Unit) -> Unit,
) {
    /** Sentences of the app's resources. */
    interface Texts {
        fun copying(): String

        fun checking(name: String): String

        fun loading(name: String): String

        fun measuring(row: String, done: Int, all: Int): String
    }

    var state = State()
        private set
    private val observers = mutableListOf<(State) -> Unit>()

    /** What is loaded; touched on the background thread alone, but for [Conversation.stop]. */
    @Volatile private var conversation: Conversation? = null
    private var engine: TextEngine? = null

    @Volatile private var bench: Bench? = null

    fun observe(observer: (State) -> Unit) {
        observers += observer
        observer(state)
    }

    fun forget(observer: (State) -> Unit) {
        observers -= observer
    }

    private fun update(change: (State) -> State) {
        state = change(state)
        observers.toList().forEach { it(state) }
    }

    /** Runs [work] in the background; what it throws becomes the sentence that the screens show. */
    private fun run(after: () -> Unit = {}, work: () -> Unit) = background.execute {
        val problem = try {
            work()
            null
        } catch (error: LobitException) {
            error.message
        } catch (error: OutOfMemoryError) {
            "there is not enough memory: close other apps, or take a smaller model (${error.message})"
        } catch (error: Exception) {
            "this failed: $error"
        }
        main {
            update { it.copy(work = null, answering = false, problem = problem ?: it.problem) }
            after()
        }
    }

    private fun show(work: Work) = main { update { it.copy(work = work) } }

    private fun progress(what: String): (Long, Long) -> Unit {
        var shown = -1
        return { done, total ->
            val thousandths = if (total > 0) (done * 1000 / total).toInt() else -1
            if (thousandths != shown) {
                shown = thousandths
                show(Work(what, if (total > 0) thousandths / 1000f else null))
            }
        }
    }

    fun dismissProblem() = update { it.copy(problem = null) }

    /** Reads the list of bundles again; the first time, those inside the APK are unpacked. */
    fun refresh() = run {
        library.unpackAssets()
        val entries = library.entries()
        main { update { it.copy(entries = entries) } }
    }

    fun takeZip(resolver: ContentResolver, uri: Uri) = run(::refresh) { library.takeZip(resolver, uri, progress(texts.copying())) }

    fun takeFolder(resolver: ContentResolver, tree: Uri) = run(::refresh) { library.takeFolder(resolver, tree, progress(texts.copying())) }

    fun remove(name: String) {
        if (state.open == name) close()
        run(::refresh) { library.remove(name) }
    }

    /** Loads a bundle for a conversation, in the place of the one that is loaded. */
    fun open(name: String) {
        if (state.open == name) return
        update { State(entries = it.entries, open = name, work = Work(texts.loading(name)), settings = it.settings, bench = it.bench) }
        run(after = { if (conversation == null) update { it.copy(open = null) } }) {
            release()
            val bundle = library.checked(name, progress(texts.checking(name)))
            show(Work(texts.loading(name)))
            val opened = runtime().textEngine(bundle)
            engine = opened
            conversation = Conversation(opened, bundle.manifest).also { it.reset(state.settings.system) }
            main { update { it.copy(chats = conversation?.chats ?: true) } }
        }
    }

    /** Ends the conversation and frees the model's memory. */
    fun close() {
        stop()
        update { it.copy(open = null, messages = emptyList(), counts = null) }
        run { release() }
    }

    private fun release() {
        conversation = null
        engine?.close()
        engine = null
    }

    /** Lets the model answer; the pieces of the answer appear as the last message. */
    fun say(text: String) {
        val settings = state.settings
        val turn = listOf(Message(Conversation.USER, text), Message(Conversation.ASSISTANT, ""))
        update { it.copy(messages = it.messages + turn, answering = true, counts = null, problem = null) }
        run(after = ::showConversation) {
            val current = conversation ?: throw LobitException("no model is loaded: open one first")
            val counts = current.reply(text, settings.length, settings.temperature) { piece -> main { append(piece) } }
            main { update { it.copy(counts = counts) } }
        }
    }

    private fun append(piece: String) = update { state ->
        val last = state.messages.lastOrNull()
        if (last == null || last.role != Conversation.ASSISTANT) state
        else state.copy(messages = state.messages.dropLast(1) + last.copy(text = last.text + piece))
    }

    /** After a turn the messages are the conversation's own: a turn that failed is not among them. */
    private fun showConversation() = update { state ->
        val messages = conversation?.messages.orEmpty().filter { it.role != Conversation.SYSTEM }
        state.copy(messages = messages)
    }

    /** Ends an answer after its current token. */
    fun stop() {
        conversation?.stop()
    }

    /** Begins a new conversation. */
    fun reset() {
        stop()
        update { it.copy(messages = emptyList(), counts = null, problem = null) }
        run { conversation?.reset(state.settings.system) }
    }

    /** Takes new settings; another system message begins a new conversation. */
    fun change(settings: Settings) {
        val anew = settings.system != state.settings.system
        update { it.copy(settings = settings) }
        if (anew && conversation != null) reset()
    }

    /** Times a bundle. Its model is loaded for this alone: a conversation ends. */
    fun bench(name: String, request: BenchRequest) {
        stop()
        update { it.copy(open = null, messages = emptyList(), problem = null, bench = BenchState(name, request, running = true)) }
        run(after = { update { state -> state.copy(bench = state.bench?.copy(running = false)) } }) {
            release()
            val bundle = library.checked(name, progress(texts.checking(name)))
            val made = Bench(probe) { threads -> runtime().engine(bundle, threads) }
            bench = made
            val result = made.run(request) { row, done, all -> show(Work(texts.measuring(row, done + 1, all), done.toFloat() / all)) }
            main { update { it.copy(bench = it.bench?.copy(result = result)) } }
        }
    }

    fun cancelBench() {
        bench?.cancel()
    }
}
