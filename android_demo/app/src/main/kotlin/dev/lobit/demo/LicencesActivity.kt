package dev.lobit.demo

import android.app.Activity
import android.os.Bundle
import android.widget.TextView

/** The licences of all that is in the app. */
class LicencesActivity : Activity() {
    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(R.layout.text)
        actionBar?.setDisplayHomeAsUpEnabled(true)
        val names = assets.list(FOLDER).orEmpty().sortedBy { it != FIRST }
        val texts = names.map { name -> assets.open("$FOLDER/$name").bufferedReader().use { it.readText() } }
        findViewById<TextView>(R.id.text).text = texts.joinToString("\n\n")
    }

    override fun onNavigateUp(): Boolean {
        finish()
        return true
    }

    private companion object {
        const val FOLDER = "licences"
        const val FIRST = "NOTICES.md"
    }
}
