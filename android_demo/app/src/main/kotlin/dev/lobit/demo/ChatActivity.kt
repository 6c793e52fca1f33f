package dev.lobit.demo

import android.app.AlertDialog
import android.content.Context
import android.content.Intent
import android.os.Bundle
import android.view.Gravity
import android.view.Menu
import android.view.MenuItem
import android.view.View
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ListView
import android.widget.TextView
import dev.lobit.core.Conversation
import dev.lobit.core.Counts
import dev.lobit.core.Message

/** A conversation; its answers appear as they are written. */
class ChatActivity : Screen() {
    private val name: String get() = intent.getStringExtra(NAME).orEmpty()
    private val rows by lazy { Rows(layoutInflater, R.layout.message, ::bind) }

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(R.layout.chat)
        title = name
        actionBar?.setDisplayHomeAsUpEnabled(true)
        findViewById<ListView>(R.id.messages).adapter = rows
        findViewById<Button>(R.id.send).setOnClickListener { if (store.state.answering) store.stop() else send() }
        store.open(name)
    }

    /** Whoever cancels the loading has no more to do here. */
    override fun cancelWork() {
        super.cancelWork()
        if (store.state.open != name) finish()
    }

    /** Whoever goes Back gives up a bundle that is not loaded yet; a rotation, or another app in front, changes nothing. */
    override fun onPause() {
        if (isFinishing) store.cancelOpening(name)
        super.onPause()
    }

    private fun send() {
        val prompt = findViewById<EditText>(R.id.prompt)
        val text = prompt.text.toString()
        if (text.isBlank()) return
        prompt.setText("")
        store.say(text)
    }

    override fun show(state: State) {
        showWork(state)
        rows.items = state.messages
        findViewById<EditText>(R.id.prompt).setHint(if (state.chats) R.string.message_hint else R.string.text_hint)
        findViewById<Button>(R.id.send).apply {
            setText(if (state.answering) R.string.stop else R.string.send)
            isEnabled = state.answering || (state.open == name && state.work == null)
        }
        if (state.work == null) findViewById<TextView>(R.id.work).setTextOrHide(state.counts?.let(::told))
    }

    private fun told(counts: Counts): String {
        val rates = listOf(counts.prefillRate, counts.decodeRate)
        val (reading, writing) = rates.map { rate -> if (rate == null) getString(R.string.unknown) else rounded(rate, 1) }
        val memory = size(app.probe.peakMemory())
        return getString(R.string.counts, counts.promptTokens, reading, counts.firstTokenMillis, counts.generatedTokens, writing, memory)
    }

    override fun onCreateOptionsMenu(menu: Menu): Boolean {
        menu.add(0, R.string.new_conversation, 0, R.string.new_conversation)
        menu.add(0, R.string.settings, 1, R.string.settings)
        return true
    }

    override fun onOptionsItemSelected(item: MenuItem): Boolean {
        when (item.itemId) {
            R.string.new_conversation -> store.reset()
            R.string.settings -> askForSettings()
            else -> return super.onOptionsItemSelected(item)
        }
        return true
    }

    private fun askForSettings() {
        val view = layoutInflater.inflate(R.layout.settings, null)
        val fields = listOf(R.id.temperature, R.id.length, R.id.system).map { view.findViewById<EditText>(it) }
        val now = store.state.settings
        listOf("${now.temperature}", "${now.length}", now.system).zip(fields) { text, field -> field.setText(text) }
        AlertDialog.Builder(this).setTitle(R.string.settings).setView(view).setNegativeButton(R.string.cancel, null)
            .setPositiveButton(R.string.ok) { _, _ ->
                val (temperature, length, system) = fields.map { it.text.toString() }
                val asked = settingsOf(temperature, length, system)
                if (asked != null) store.change(asked)
                findViewById<TextView>(R.id.problem).setTextOrHide(if (asked == null) getString(R.string.not_a_number) else null)
            }
            .show()
    }

    private fun bind(view: View, message: Message) {
        val mine = message.role == Conversation.USER
        (view as LinearLayout).gravity = if (mine) Gravity.END else Gravity.START
        view.findViewById<TextView>(R.id.text).apply {
            if (text.toString() != message.text) text = message.text
            setBackgroundColor(getColor(if (mine) R.color.mine else R.color.theirs))
            contentDescription = getString(if (mine) R.string.you_said else R.string.model_said, message.text)
        }
    }

    companion object {
        private const val NAME = "name"
        private const val HOTTEST = 2f

        fun intent(context: Context, name: String): Intent = Intent(context, ChatActivity::class.java).putExtra(NAME, name)

        /** Settings from what was typed; null where a number is none or out of range. */
        fun settingsOf(temperature: String, length: String, system: String): Settings? {
            val hot = temperature.replace(',', '.').toFloatOrNull()?.takeIf { it in 0f..HOTTEST }
            val long = length.toIntOrNull()?.takeIf { it > 0 }
            return if (hot == null || long == null) null else Settings(hot, long, system)
        }
    }
}
